// The tab "Group": what the selected cells are, per level and column, against the whole map.

import type { CellSet } from "./data";
import { download, downloadCsv } from "./download";
import { count, percent } from "./format";
import { type Page, textOf } from "./page";
import { Near } from "./near";
import { type Mode, MODES, type Selection } from "./selection";
import { type Part, Parts, Table } from "./widgets";

export function Group({ page }: { page: Page }) {
  const { about, cells, selection, tree } = page;
  if (!selection) {
    return (
      <>
        <p class="empty">
          Hold Shift and draw around cells, or press Lasso: what they are, per level, against the whole map. Or tick types
          in the legend.
        </p>
        <Select page={page} />
        <Near page={page} />
      </>
    );
  }
  const [group, yours] = selection.rows;
  const levels = about.levels.map((title, k) => {
    const kinds = tree.nodes.map(({ colour }, node) => ({ name: tree.name(node), colour }));
    return { title, parts: tally(kinds, cells.node, group, (node) => tree.at(node, k + 1)) };
  });
  const ofText = cells.columns.filter(({ values }) => values).map((column) => {
    const names = ["missing", ...column.values!];
    const kinds = names.map((name, code) => ({ name, colour: page.colourOf(column, code) }));
    return { title: column.name, parts: tally(kinds, column.codes, group, (code) => code) };
  });
  const tables = [...levels, ...ofText];
  return (
    <>
      <h2>{count(group.length)} cells</h2>
      <p class="note">
        {percent(group.length / about.cells)} of the map{yours.length > 0 && `, and ${count(yours.length)} of your cells`}.
        Bars: share of the group; the line: share of the whole map.
      </p>
      <p class="buttons">
        <button onClick={() => save(page, group)}>Download as CSV</button>
        <button id="save-ids" onClick={() => saveIds(page, selection)}>Download ids</button>
        <button onClick={() => page.select(null)}>Clear</button>
      </p>
      <Select page={page} />
      {group.length > 0 && <Near page={page} />}
      {group.length > 0 && <Enriched tables={tables} size={group.length} all={about.cells} />}
      {group.length > 0 && tables.map((table) => <Parts {...table} size={group.length} all={about.cells} />)}
    </>
  );
}

/** What the next selection does, and a button that selects the cells ticked in the legend. */
export function Select({ page }: { page: Page }) {
  const setMode = (event: Event) => page.update({ mode: (event.currentTarget as HTMLSelectElement).value as Mode });
  return (
    <p class="buttons">
      {page.selection && (
        <select id="mode" aria-label="the next selection" value={page.mode} onChange={setMode}>
          {Object.entries(MODES).map(([mode, text]) => <option value={mode}>the next selection {text}</option>)}
        </select>
      )}
      {page.ticked.size > 0 && <button onClick={() => page.selectTicked()}>Select cells {page.ticks}</button>}
    </p>
  );
}

/** What is more frequent in the group than on the whole map, by the ratio of the shares. */
function Enriched({ tables, size, all }: { tables: { title: string; parts: Part[] }[]; size: number; all: number }) {
  const rows = tables.flatMap(({ title, parts }) =>
    parts.map((part) => ({ ...part, title, ratio: part.cells / size / (part.ofAll / all) })),
  );
  const enriched = rows.filter(({ cells, ratio }) => cells >= 5 && ratio >= 1.5).sort((a, b) => b.ratio - a.ratio);
  const shown = enriched.filter(({ name }, i) => enriched.findIndex((other) => other.name === name) === i).slice(0, 6);
  if (!shown.length) return null;
  const lines = shown.map(({ name, title, cells, ratio }) => {
    return [<>{name} <small>{title}</small></>, count(cells), `${ratio.toFixed(1)}×`];
  });
  return <Table kind="parts" caption="Enriched" head={["", "Cells", "Group / atlas"]} rows={lines} />;
}

const idOf = ({ names }: CellSet, row: number) => names?.[row] ?? String(row);

/** One id a line; the first line, with a #, is the rule. */
function saveIds(page: Page, { rows, rule }: Selection): void {
  const ids = rows.flatMap((ofLayer, layer) => ofLayer.map((row) => idOf(page.set(layer), row)));
  download("cells.txt", [`# ${page.about.title}: ${rule}`, ...ids, ""].join("\n"));
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
    return [idOf(cells, row), ...labels, ...columns.map((column) => textOf(column, row))];
  });
  downloadCsv("group.csv", ["cell_id", ...about.levels, ...columns.map(({ name }) => name)], rows);
}
