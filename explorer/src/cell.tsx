// The tab "Cell": a cell and its nearest neighbours, by the prefix and by the vector as it came.

import type { Answers } from "./annotator";
import { percent } from "./format";
import type { Hit } from "./map";
import type { Neighbours } from "./neighbours";
import { type Page, textOf } from "./page";
import { Bar, Facts, Swatch, Table } from "./widgets";

export function CellPanel({ page }: { page: Page }) {
  const { about, cell, cellNeighbours: neighbours, stop, tree } = page;
  if (!cell) {
    const what = "the page computes its nearest neighbours under the prefix, and those of the vector as it came";
    return <p class="empty">Click a cell on the map: {what}.</p>;
  }
  if (!neighbours) return <p class="empty">Unpacking the vectors …</p>;
  const { title, node, lines } = page.describe(cell);
  const lists: [string, Neighbours][] = [[`${about.blocks[stop - 1]}: ${page.prefixName()}`, neighbours.fractal], ["Raw vector", neighbours.raw]];
  const agreement = about.levels.map((level, k) => {
    const label = tree.depth(node) > k ? tree.at(node, k + 1) : null;
    const head = <>{level}<small>{label === null ? "not answered" : tree.name(label)}</small></>;
    const share = (rows: number[]) => {
      if (label === null) return "–";
      const same = rows.filter((row) => tree.isBelow(page.cells.node[row], label)).length / rows.length;
      return <><Bar share={same} colour={tree.nodes[label].colour} /><span class="figure">{percent(same)}</span></>;
    };
    return [head, ...lists.map(([, { rows }]) => share(rows))];
  });
  return (
    <>
      <h2><Swatch colour={tree.nodes[node].colour} />{tree.name(node)}</h2>
      <p class="note">{title}</p>
      <Facts lines={lines} />
      {page.set(cell.layer).answers && <Answer page={page} hit={cell} answers={page.set(cell.layer).answers!} />}
      <Table
        kind="agreement" caption={`Of the ${neighbours.raw.rows.length} nearest, how many have this cell's label`}
        head={["Level", ...lists.map(([name]) => name)]} rows={agreement}
      />
      <div class="lists">{lists.map(([name, { rows, cosines }]) => <List {...{ page, name, rows, cosines }} />)}</div>
      <p class="note">Figures are cosines. Solid lines: neighbours by this prefix; dashed: by the vector as it came.</p>
    </>
  );
}

/** The label of each level with its probability and the runner-up, and why the answer is not deeper. */
function Answer({ page, hit, answers }: { page: Page; hit: Hit; answers: Answers }) {
  const { about, tree } = page;
  const { levels, annotator } = about;
  const { caution, cautiousDepth, confidence, novel, paths } = annotator;
  const depth = answers.depth[hit.row];
  const pValue = answers.pValue[hit.row];
  const votes = page.votes(hit);
  const probability = levels.map((_, k) => answers.probability[hit.row * levels.length + k]);
  const rows = paths[answers.path[hit.row]].map((node, k) => {
    const [second] = votes?.[k].filter((vote) => vote.node !== node) ?? [];
    const runnerUp = second ? `${tree.name(second.node)} ${percent(second.share)}` : "none";
    const label = <>{levels[k]}<small>{tree.name(node)}{k < depth ? "" : ", not answered"}</small></>;
    const bar = <Bar share={probability[k]} colour={tree.nodes[node].colour} mark={confidence} />;
    return [label, <>{bar}<span class="figure">{percent(probability[k])}</span></>, <small>{runnerUp}</small>];
  });
  const isCautious = pValue < caution && depth === cautiousDepth && probability[depth] >= confidence;
  const alike = `${percent(pValue)} of held-out cells look as little like a type of the reference`;
  return (
    <>
      <Table kind="agreement" caption="Answer" head={["Level", "Probability", "Runner-up, of the votes"]} rows={rows} />
      {pValue < novel && <p class="note">Novel: only {alike}.</p>}
      {depth < levels.length && (
        <p class="note">
          It stops {depth ? `at the ${levels[depth - 1]}` : "before the first level"}:{" "}
          {isCautious ? `only ${alike}.` : `the probability of the ${levels[depth]} is below ${confidence}.`}
        </p>
      )}
    </>
  );
}

function List({ page, name, rows, cosines }: { page: Page; name: string } & Neighbours) {
  const { tree, study } = page;
  const { node: nodes } = page.cells;
  const studies = study && new Set(rows.map((row) => textOf(study, row))).size;
  return (
    <div>
      <h3>{name}</h3>
      {study && <p class="note">{study.name}: {studies} of {study.values!.length}</p>}
      <ol>
        {rows.map((row, i) => (
          <li>
            <button title={tree.path(nodes[row]) || "no label"} onClick={() => page.choose({ layer: 0, row })}>
              <Swatch colour={tree.nodes[nodes[row]].colour} />
              <span class="text">{tree.name(nodes[row])}{study && <small>{textOf(study, row) || "–"}</small>}</span>
              <span class="figure">{cosines[i].toFixed(3)}</span>
            </button>
          </li>
        ))}
      </ol>
    </div>
  );
}
