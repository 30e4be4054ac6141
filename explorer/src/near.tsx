// Which labels lie among which: of the nearest cells of a selection, or of the whole map, by the prefix of the slider.

import { group, rollups, sum } from "d3-array";
import { cellsText, count, percent } from "./format";
import { take } from "./matrix";
import { NEAREST, type Page } from "./page";
import { Same, Table } from "./widgets";

const PAIRS = 2e7; // cells times cells of the map whose cosines are computed: some seconds, and 80 MB
const SHOWN = 12; // labels, those with the fewest neighbours of their kind first

/** The nearest cells, computed when a person asks; they go when one of the inputs changes. */
export interface Nearness {
  inputs: unknown[];
  rows: number[]; // cells of the group: all, or about equally many per label
  weights: number[]; // cells that each stands for
  nearest: number[][];
}

interface Kind {
  node: number;
  cells: number; // of the group
  most: number; // share of the neighbours that can have the same label: on the map there are no more
  same: number; // share that have it
  other: [number, number] | null; // the most frequent other label, and its share
}

const inputsOf = ({ selection, stop }: Page) => [selection, stop];

function search(page: Page): Nearness {
  const { fractal } = page.vectors!;
  const { labels } = page.labelled(page.about.levels.length); // of the finest level: the same cells at each level
  const byLabel = [...group(page.group ?? labels.keys(), (row) => labels[row]).values()];
  const most = Math.ceil(PAIRS / fractal.n / byLabel.length);
  const isAll = sum(byLabel, (all) => all.length) * fractal.n <= PAIRS;
  const some = byLabel.flatMap((all) => {
    const rows = isAll ? all : all.filter((_, i) => (i * most) % all.length < most); // evenly
    return rows.map((row) => ({ row, weight: all.length / rows.length }));
  });
  const rows = some.map(({ row }) => row);
  const [found] = fractal.search(take(fractal.rows, rows, fractal.dim), NEAREST + 1, [page.about.widths[page.stop - 1]]);
  const nearest = found.map(({ rows: near }, i) => near.filter((row) => row !== rows[i]).slice(0, NEAREST));
  return { inputs: inputsOf(page), rows, weights: some.map(({ weight }) => weight), nearest };
}

function kindsOf(page: Page, { rows, weights, nearest }: Nearness): Kind[] {
  const { labels } = page.labelled(page.nearLevel);
  const byLabel = [...group(rows.keys(), (i) => labels[rows[i]])].filter(([node]) => node);
  const kinds = byLabel.map(([node, asked]) => {
    const near = asked.flatMap((i) => nearest[i].map((row) => ({ label: labels[row], weight: weights[i] })));
    const all = sum(near, ({ weight }) => weight);
    const shares = rollups(near, (of) => sum(of, ({ weight }) => weight) / all, ({ label }) => label).sort((a, b) => b[1] - a[1]);
    const same = shares.find(([label]) => label === node)?.[1] ?? 0;
    const other = shares.find(([label]) => label !== node) ?? null;
    return { node, cells: sum(asked, (i) => weights[i]), most: page.mostSame(node, page.nearLevel), same, other };
  });
  // Labels of few cells can't reach 100 %: they stand last.
  return kinds.sort((a, b) => Number(a.most < 1) - Number(b.most < 1) || a.same - b.same);
}

export function Near({ page }: { page: Page }) {
  const { about, near, nearLevel, selection } = page;
  const what = `${selection ? "What they are near" : "What is mixed up"}, by ${page.prefixName()}`;
  const isMade = near && inputsOf(page).every((input, i) => input === near.inputs[i]);
  return (
    <>
      <p class="buttons">
        {!isMade && <button id="ask-near" disabled={!page.vectors} onClick={() => page.update({ near: search(page) })}>{what}</button>}
        <select
          id="near-level" aria-label="level of the labels that are compared" value={nearLevel}
          onChange={(event) => page.update({ nearLevel: Number(event.currentTarget.value) })}
        >
          {about.levels.map((level, k) => <option value={k + 1}>labels of the {level}</option>)}
        </select>
      </p>
      {isMade && <Kinds {...{ page, near, what }} />}
    </>
  );
}

function Kinds({ page, near, what }: { page: Page; near: Nearness; what: string }) {
  const { about, tree } = page;
  const kinds = kindsOf(page, near);
  const rows = kinds.slice(0, SHOWN).map(({ node, cells, most, same, other }) => [
    <>{tree.name(node)}<small>{cellsText(Math.round(cells))}</small></>,
    <Same {...{ same, most }} colour={tree.nodes[node].colour} />,
    other ? `${tree.name(other[0])} ${percent(other[1])}` : "none",
  ]);
  const all = page.group?.length ?? about.cells;
  const isSome = near.rows.length < all;
  return (
    <>
      <Table
        kind="agreement" caption={`${what}: the ${NEAREST} nearest other cells of the map`}
        head={[about.levels[page.nearLevel - 1], "Same", "Most others"]} rows={rows}
      />
      <p class="note">
        {!about.known && "Labels are best guesses, also of cells without an answer. "}
        {kinds.length > SHOWN && `${SHOWN} of ${kinds.length} labels, the most mixed first. `}
        {isSome && `Of ${count(all)} cells ${count(near.rows.length)} were looked at, drawn evenly from each ${about.levels.at(-1)}. `}
        A label of up to {NEAREST} cells can't reach 100%, and stands last.
      </p>
    </>
  );
}
