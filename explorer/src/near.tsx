// Which labels lie among which: of the nearest cells of a selection, or of the whole map, by the prefix of the slider.

import { group, rollups, sum } from "d3-array";
import { cellsText, count, percent } from "./format";
import { take } from "./matrix";
import { memo, NEAREST, type Page } from "./page";
import { Choice, Same, Table } from "./widgets";

const PAIRS = 2e7; // cells times cells of the map whose cosines are computed: some seconds, and 80 MB
const SHOWN = 12; // labels, those with the fewest neighbours of their kind first

/** What the table depends on: its neighbours are computed when a person asks, and go when one of these changes. */
const inputsOf = ({ selection, stop }: Page) => [selection, stop];

/** The nearest cells of the group's: of all of them, or of about equally many per finest label, each with a weight. */
function search(page: Page) {
  const { fractal } = page.vectors!;
  const { labels } = page.guesses.at(-1)!; // of the finest level: the same cells at each level
  const byLabel = [...group(page.group ?? labels.keys(), (row) => labels[row]).values()];
  const isAll = (page.group ?? labels).length * fractal.n <= PAIRS;
  const most = Math.ceil(PAIRS / fractal.n / byLabel.length);
  const some = byLabel.flatMap((all) => {
    const rows = isAll ? all : all.filter((_, i) => (i * most) % all.length < most); // evenly
    return rows.map((row) => ({ row, weight: all.length / rows.length }));
  });
  const queries = take(fractal.rows, some.map(({ row }) => row), fractal.dim);
  const [found] = fractal.search(queries, NEAREST + 1, [page.about.widths[page.stop - 1]]);
  const cells = some.map((cell, i) => ({ ...cell, near: found[i].rows.filter((row) => row !== cell.row).slice(0, NEAREST) }));
  return { inputs: inputsOf(page), cells };
}

export type Nearness = ReturnType<typeof search>;

const remembered = memo<ReturnType<typeof kindsOf>>();

/** Per label of the cells: the share of the neighbours with the same label, the most it can be, and the next label. */
function kindsOf({ guesses, nearLevel, mostSame }: Page, cells: Nearness["cells"]) {
  const { labels } = guesses[nearLevel - 1];
  const kinds = [...group(cells, ({ row }) => labels[row])].filter(([node]) => node).map(([node, ofKind]) => {
    const votes = ofKind.flatMap(({ near, weight }) => near.map((row) => ({ label: labels[row], weight })));
    const all = sum(votes, ({ weight }) => weight);
    const shares = rollups(votes, (of) => sum(of, ({ weight }) => weight) / all, ({ label }) => label).sort((a, b) => b[1] - a[1]);
    const same = shares.find(([label]) => label === node)?.[1] ?? 0;
    const other = shares.find(([label]) => label !== node);
    return { node, count: sum(ofKind, ({ weight }) => weight), same, most: mostSame(node, nearLevel), other };
  });
  // Labels of few cells can't reach 100 %: they stand last.
  return kinds.sort((a, b) => Number(a.most < 1) - Number(b.most < 1) || a.same - b.same);
}

export function Near({ page }: { page: Page }) {
  const { about, near, nearLevel, selection, tree } = page;
  const what = `${selection ? "What they are near" : "What is mixed up"}, by ${page.prefixName()}`;
  const isMade = near && inputsOf(page).every((input, i) => input === near.inputs[i]);
  const kinds = isMade ? remembered([near, nearLevel], () => kindsOf(page, near.cells)) : [];
  const rows = kinds.slice(0, SHOWN).map(({ node, count, most, same, other }) => [
    <>{tree.name(node)}<small>{cellsText(Math.round(count))}</small></>,
    <Same {...{ same, most }} colour={tree.nodes[node].colour} />,
    other ? `${tree.name(other[0])} ${percent(other[1])}` : "none",
  ]);
  const all = page.group?.length ?? about.cells;
  return (
    <>
      <p class="buttons">
        {!isMade && <button id="ask-near" disabled={!page.vectors} onClick={() => page.update({ near: search(page) })}>{what}</button>}
        <Choice
          id="near-level" aria-label="level of the labels that are compared" value={nearLevel}
          options={about.levels.map((level, k) => [k + 1, `labels of the ${level}`])} choose={(k) => page.update({ nearLevel: Number(k) })}
        />
      </p>
      {isMade && (
        <>
          <Table
            kind="agreement" caption={`${what}: the ${NEAREST} nearest other cells of the map`}
            head={[about.levels[nearLevel - 1], "Same", "Most others"]} rows={rows}
          />
          <p class="note">
            {!about.known && "Labels are best guesses, also of cells without an answer. "}
            {kinds.length > SHOWN && `${SHOWN} of ${kinds.length} labels, the most mixed first. `}
            {near.cells.length < all && `Of ${count(all)} cells ${count(near.cells.length)} were looked at, of each label about as many. `}
            A label of up to {NEAREST} cells can't reach 100%, and stands last.
          </p>
        </>
      )}
    </>
  );
}
