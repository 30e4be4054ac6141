// The tab "Cell": a cell and its nearest neighbours, by the prefix and by the vector as it came.

import type { Answers } from "./annotator";
import { percent } from "./format";
import type { Hit } from "./map";
import type { Neighbours } from "./neighbours";
import { NEAREST, type Page, textOf } from "./page";
import { Bar, Facts, Same, Swatch, Table } from "./widgets";

export function CellPanel({ page }: { page: Page }) {
  const { about, cell, cellNeighbours: neighbours, stop, tree } = page;
  if (!cell) {
    const what = "the page computes its nearest neighbours under the prefix, and those of the vector as it came";
    return <p class="empty">Click a cell on the map: {what}.</p>;
  }
  if (!neighbours) return <p class="empty">Unpacking the vectors …</p>;
  const { title, name, colour, lines } = page.describe(cell);
  const { answers } = page.set(cell.layer);
  const lists: [string, Neighbours][] = [[`${about.blocks[stop - 1]}: ${page.prefixName()}`, neighbours.fractal], ["Raw vector", neighbours.raw]];
  const agreement = about.levels.map((level, k) => {
    const label = page.guess(cell, k + 1);
    const { labels } = page.guesses[k];
    const most = page.mostSame(label, k + 1, cell.layer);
    const share = (rows: number[]) => {
      const same = rows.filter((row) => labels[row] === label).length / rows.length;
      return label ? <Same {...{ same, most }} colour={tree.nodes[label].colour} /> : "–";
    };
    return [<>{level}<small>{tree.name(label)}</small></>, ...lists.map(([, { rows }]) => share(rows))];
  });
  return (
    <>
      <h2><Swatch colour={colour} />{name}</h2>
      <p class="note">{title}</p>
      <Facts lines={lines} />
      {answers && <Answer page={page} hit={cell} answers={answers} />}
      <Table
        kind="agreement" caption={`Of the ${NEAREST} nearest other cells of the map, how many have this ${answers ? "best guess" : "label"}`}
        head={["Level", ...lists.map(([name]) => name)]} rows={agreement}
      />
      <div class="lists">{lists.map(([name, { rows, cosines }]) => <List {...{ page, name, rows, cosines }} />)}</div>
      <p class="note">{!about.known && `Labels are best guesses; ?: no answer at the ${about.levels.at(-1)}. `}Figures are cosines. Solid lines: neighbours by this prefix; dashed: by the vector as it came.</p>
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
    const [first, second] = votes?.[k] ?? [];
    const others = second ? `, ${tree.name(second.node)} ${percent(second.share)}` : "";
    const label = <>{levels[k]}<small>{tree.name(node)}{k < depth ? "" : ": no answer"}</small></>;
    const bar = <Bar share={probability[k]} colour={tree.nodes[node].colour} mark={confidence} />;
    return [label, <>{bar}<span class="figure">{percent(probability[k])}</span></>, <small>{first && percent(first.share) + others}</small>];
  });
  const isCautious = pValue < caution && depth === cautiousDepth && probability[depth] >= confidence;
  return (
    <>
      <Table kind="agreement" caption="Answer" head={["Level", "Probability", "Votes, and the runner-up's"]} rows={rows} />
      {pValue < caution && (
        <p class="note">
          {pValue < novel ? "Novel" : "Unusual"}: only {percent(pValue)} of the cells that the reference was checked with fit its
          types as badly (the p-value).
        </p>
      )}
      {depth < levels.length && (
        <p class="note">
          {depth ? `It stops at the ${levels[depth - 1]}` : "No answer"}:{" "}
          {isCautious
            ? "such a cell gets no label below it. The probabilities hold for a cell of one of the reference's types."
            : `the probability of the ${levels[depth]} is below ${confidence}, the black line.`}
        </p>
      )}
    </>
  );
}

function List({ page, name, rows, cosines }: { page: Page; name: string } & Neighbours) {
  const { about, tree, study } = page;
  const { answers } = page.cells;
  const { labels } = page.guesses.at(-1)!;
  const isUnsure = (row: number) => answers && answers.depth[row] < about.levels.length;
  return (
    <div>
      <h3>{name}</h3>
      <ol>
        {rows.map((row, i) => (
          <li>
            <button title={tree.path(labels[row]) || tree.name(0)} onClick={() => page.choose({ layer: 0, row })}>
              <Swatch colour={tree.nodes[labels[row]].colour} />
              <span class="text">{tree.name(labels[row])}{isUnsure(row) && " ?"}{study && <small>{textOf(study, row) || "–"}</small>}</span>
              <span class="figure">{cosines[i].toFixed(3)}</span>
            </button>
          </li>
        ))}
      </ol>
    </div>
  );
}
