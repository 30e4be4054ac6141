// The tab "Group": what the selected cells are, per level and column, against the whole map.

import type { CellSet } from "./data";
import { download, downloadCsv, fileName } from "./download";
import { cellsText, count, percent } from "./format";
import { type Page, textOf, valueOf } from "./page";
import { Near } from "./near";
import { MODES, type Selection } from "./selection";
import { Choice, type Part, Parts, Table } from "./widgets";

const LISTED = 8; // cells of a group that are named

export function Group({ page }: { page: Page }) {
  const { about, cells, selection, tree } = page;
  if (!selection) {
    return (
      <>
        <p class="empty">
          Hold Shift and draw around cells, or press Lasso: what they are, per level, against the whole map. Or tick types
          in the legend. Without a selection, the whole map can be asked:
        </p>
        <Near page={page} />
      </>
    );
  }
  const [group, yours] = selection.rows;
  const levels = about.levels.map((title, k) => {
    const kinds = tree.nodes.map(({ colour }, node) => ({ name: tree.name(node), colour }));
    return { title, parts: tally(kinds, cells.node, group, (node) => (tree.depth(node) > k ? tree.at(node, k + 1) : 0)) };
  });
  const ofText = cells.columns.filter(({ values }) => values).map((column) => {
    const kinds = [0, ...column.values!].map((_, code) => ({ name: valueOf(column, code), colour: page.colourOf(column, code) }));
    return { title: column.name, isOfAnswer: column.isOfAnswer, parts: tally(kinds, column.codes, group, (code) => code) };
  });
  const tables: { title: string; parts: Part[]; isOfAnswer?: boolean }[] = [...levels, ...ofText];
  return (
    <>
      <h2>{cellsText(group.length)}</h2>
      <p class="note">
        Selected: {selection.rule}. {percent(group.length / about.cells)} of the map{yours.length > 0 && `, and ${count(yours.length)} of your cells`}.
        Bars: share of the group; the line: share of the whole map. {group.length > 0 && "Ids: "}
        {group.slice(0, LISTED).map((row) => <><button onClick={() => page.choose({ layer: 0, row })}>{idOf(cells, row)}</button> </>)}
        {group.length > LISTED && "…"}
      </p>
      <p class="buttons">
        <button onClick={() => save(page, group, selection.rule)}>Download as CSV</button>
        <button id="save-ids" onClick={() => saveIds(page, selection)}>Download ids</button>
        <button onClick={() => page.select(null)}>Clear</button>
      </p>
      <p class="buttons"><Mode page={page} /></p>
      {group.length > 0 && <Near page={page} />}
      {group.length > 0 && <Enriched tables={tables.filter(({ isOfAnswer }) => !isOfAnswer)} size={group.length} all={about.cells} />}
      {group.length > 0 && tables.map((table) => <Parts {...table} size={group.length} all={about.cells} />)}
    </>
  );
}

/** What the next selection does to this one. */
export const Mode = ({ page }: { page: Page }) => page.selection && (
  <Choice
    id="mode" aria-label="the next selection" value={page.mode} choose={(mode) => page.update({ mode: mode as Page["mode"] })}
    options={Object.entries(MODES).map(([mode, text]) => [mode, `the next selection ${text}`])}
  />
);

/** What is more frequent in the group than on the whole map, by the ratio of the shares. */
function Enriched({ tables, size, all }: { tables: { title: string; parts: Part[] }[]; size: number; all: number }) {
  const rows = tables.flatMap(({ title, parts }) =>
    parts.slice(1).map((part) => ({ ...part, title, ratio: part.cells / size / (part.ofAll / all) })),
  );
  const enriched = rows.filter(({ cells, ratio }) => cells >= 5 && ratio >= 1.5).sort((a, b) => b.ratio - a.ratio);
  // Labels of the same cells, one below the other, have the same counts: the deepest, which is the last, says most.
  const shown = [...new Map(enriched.map((row) => [`${row.cells} ${row.ofAll}`, row])).values()].slice(0, 6);
  if (!shown.length) return null;
  const lines = shown.map(({ name, title, cells, ratio }) => {
    return [<>{name} <small>{title}</small></>, count(cells), `${ratio.toFixed(1)}×`];
  });
  return <Table kind="parts" caption="Enriched" head={["", "Cells", "Group / map"]} rows={lines} />;
}

const idOf = ({ names }: CellSet, row: number) => names?.[row] ?? String(row);

/** One id a line; the first line, with a #, is the rule. */
function saveIds(page: Page, { rows, rule }: Selection): void {
  const ids = rows.flatMap((ofLayer, layer) => ofLayer.map((row) => idOf(page.set(layer), row)));
  download(fileName(page.about.title, "cells.txt"), [`# ${page.about.title}: ${rule}`, ...ids, ""].join("\n"));
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

/** The rule stands in the head of a last, empty column, so that any reader of CSV files still reads the table. */
function save({ about, cells, tree }: Page, group: number[], rule: string): void {
  const { columns } = cells;
  const rows = group.map((row) => {
    const node = cells.node[row];
    const labels = about.levels.map((_, k) => (tree.depth(node) > k ? tree.name(tree.at(node, k + 1)) : ""));
    return [idOf(cells, row), ...labels, ...columns.map((column) => textOf(column, row)), ""];
  });
  const fields = ["cell_id", ...about.levels, ...columns.map(({ name }) => name), `# ${about.title}: ${rule}`];
  downloadCsv(fileName(about.title, "group.csv"), fields, rows);
}
