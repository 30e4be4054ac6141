// Which labels lie among which: of the nearest cells of a selection, or of the whole map, by the prefix of the slider.

import { group, rollups } from "d3-array";
import { percent } from "./format";
import { take } from "./matrix";
import type { Page } from "./page";
import { Bar, Table } from "./widgets";

const NEAREST = 15;
const ASKED = 500; // cells whose neighbours are computed, about equally many per label: about a second
const SHOWN = 12; // labels, those with the fewest neighbours of their kind first

interface Kind {
  node: number;
  cells: number;
  same: number; // share of the neighbours that have the same label
  other: [number, number] | null; // the most frequent other label, and its share
}

/** What the answer depends on: it is computed when a person asks, and goes when one of these changes. */
const inputsOf = ({ selection, stop, level }: Page) => [selection, stop, level];

/** The label of each cell at the level that colours: the best guess where the answer is not so deep. */
function labelsOf({ cells: { answers, node: nodes }, tree, about }: Page, level: number): number[] {
  return Array.from(nodes, (node, row) => (answers ? about.annotator.paths[answers.path[row]][level - 1] : tree.at(node, level)));
}

function kindsOf(page: Page): Kind[] {
  const { rows, dim } = page.vectors!.fractal;
  const labels = labelsOf(page, page.level ?? page.about.levels.length);
  const byLabel = [...group(page.group ?? labels.keys(), (row) => labels[row])].filter(([node]) => node);
  const most = Math.ceil(ASKED / byLabel.length);
  return byLabel.map(([node, all]) => {
    const some = all.filter((_, i) => (i * most) % all.length < most); // evenly
    const found = page.vectors!.fractal.search(take(rows, some, dim), NEAREST + 1, [page.about.widths[page.stop - 1]])[0];
    const near = found.flatMap(({ rows: nearest }, i) => nearest.filter((row) => row !== some[i]).slice(0, NEAREST));
    const shares = rollups(near, (of) => of.length / near.length, (row) => labels[row]).sort((a, b) => b[1] - a[1]);
    const same = shares.find(([label]) => label === node)?.[1] ?? 0;
    return { node, cells: all.length, same, other: shares.find(([label]) => label !== node) ?? null };
  });
}

export function Near({ page }: { page: Page }) {
  const { about, near, tree } = page;
  const what = `by ${page.prefixName()}`;
  if (!near || inputsOf(page).some((input, i) => input !== near.inputs[i])) {
    const ask = () => page.update({ near: { inputs: inputsOf(page), kinds: kindsOf(page) } });
    const text = page.selection ? "What they are near" : "What is mixed up";
    return <p class="buttons"><button id="ask-near" disabled={!page.vectors} onClick={ask}>{text}, {what}</button></p>;
  }
  const rows = near.kinds.sort((a, b) => a.same - b.same).slice(0, SHOWN).map(({ node, cells, same, other }) => [
    <>{tree.name(node)}<small>{cells} cells</small></>,
    <><Bar share={same} colour={tree.nodes[node].colour} /><span class="figure">{percent(same)}</span></>,
    other ? `${tree.name(other[0])} ${percent(other[1])}` : "none",
  ]);
  const level = about.levels[(page.level ?? about.levels.length) - 1];
  return <Table kind="agreement" caption={`Of the ${NEAREST} nearest, ${what}`} head={[level, "Same", "Most others"]} rows={rows} />;
}

export type Nearness = { inputs: unknown[]; kinds: Kind[] };
