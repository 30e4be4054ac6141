// The tab "Group": what the cells in the lasso are, per level and column, against the whole map.

import { count, downloadCsv, percent } from "./format";
import { type Page, textOf } from "./page";
import { type Part, Parts } from "./widgets";

export function Group({ page }: { page: Page }) {
  const { about, cells, group, map, tree } = page;
  if (!group) {
    const what = "what they are, per level, against the whole map";
    return <p class="empty">Hold Shift and draw around cells, or press Lasso: {what}.</p>;
  }
  const yours = page.yours && map.lasso ? map.inside(1, map.lasso).length : 0;
  const levels = about.levels.map((title, k) => {
    const kinds = tree.nodes.map(({ colour }, node) => ({ name: tree.name(node), colour }));
    return { title, parts: tally(kinds, cells.node, group, (node) => tree.at(node, k + 1)) };
  });
  const ofText = cells.columns.filter(({ values }) => values).map((column) => {
    const names = ["missing", ...column.values!];
    const kinds = names.map((name, code) => ({ name, colour: page.colourOf(column, code) }));
    return { title: column.name, parts: tally(kinds, column.codes, group, (code) => code) };
  });
  const share = percent(group.length / about.cells);
  return (
    <>
      <h2>{count(group.length)} cells</h2>
      <p class="note">
        {share} of the map{yours > 0 && `, and ${count(yours)} of your cells`}. Bars: share of the group; the line: share
        of the whole map.
      </p>
      <p class="buttons">
        <button onClick={() => save(page, group)}>Download as CSV</button>
        <button onClick={() => page.select(null)}>Clear</button>
      </p>
      {group.length > 0 && [...levels, ...ofText].map((table) => <Parts {...table} size={group.length} all={about.cells} />)}
    </>
  );
}

/** Count cells by kind, in the group and on the whole map; `kindOf` maps the code of a cell to its kind. */
function tally(
  kinds: { name: string; colour: string }[], codes: ArrayLike<number>, group: number[], kindOf: (code: number) => number,
): Part[] {
  const parts = kinds.map((kind) => ({ ...kind, cells: 0, ofAll: 0 }));
  for (let row = 0; row < codes.length; row++) parts[kindOf(codes[row])].ofAll++;
  for (const row of group) parts[kindOf(codes[row])].cells++;
  return parts;
}

function save({ about, cells, tree }: Page, group: number[]): void {
  const { columns } = cells;
  const rows = group.map((row) => {
    const node = cells.node[row];
    const labels = about.levels.map((_, k) => (tree.depth(node) > k ? tree.name(tree.at(node, k + 1)) : ""));
    return [cells.names ? cells.names[row] : row, ...labels, ...columns.map((column) => textOf(column, row))];
  });
  downloadCsv("group.csv", ["cell_id", ...about.levels, ...columns.map(({ name }) => name)], rows);
}
