// What is said beside the map: of a cell and its neighbours, and of a group of cells.

import type { Column } from "./data";
import { bar, count, element, percent, swatch } from "./dom";
import type { Found } from "./neighbours";
import type { Tree } from "./tree";

export interface Facts {
  tree: Tree;
  levels: string[];
  node: ArrayLike<number>; // of each cell on the map
  columns: { column: Column; values: ArrayLike<number> }[];
  study: number; // the column that is told of neighbours; -1: there is none
}

export function columnValue({ column, values }: Facts["columns"][number], row: number): string {
  if (!column.values) return Number.isFinite(values[row]) ? String(Number(values[row].toPrecision(4))) : "–";
  return values[row] ? column.values[values[row] - 1] : "–";
}

/** Share of the neighbours that have the label of `node` at each level; null where the cell has no label there. */
export function agreement(facts: Facts, node: number, rows: number[]): (number | null)[] {
  const { tree, levels } = facts;
  return levels.map((_, k) => {
    if (tree.depth[node] < k + 1) return null;
    const own = tree.at(node, k + 1);
    return rows.filter((row) => tree.isBelow(facts.node[row], own)).length / rows.length;
  });
}

export interface CellFacts {
  title: string;
  node: number;
  lines: [string, string][];
  found: [string, Found][]; // by prefix, and by the raw vector
}

export function cellPanel(facts: Facts, cell: CellFacts, pick: (row: number) => void): HTMLElement[] {
  const { tree, levels } = facts;
  const shares = cell.found.map(([, found]) => agreement(facts, cell.node, found.rows));
  const table = element("table", { className: "agreement" });
  const k = cell.found[0][1].rows.length;
  table.append(
    element("caption", null, `Of the ${k} nearest, how many have this cell's label`),
    element("tr", null, element("th", null, "Level"), ...cell.found.map(([name]) => element("th", null, name))),
  );
  levels.forEach((level, i) => {
    const known = tree.depth[cell.node] > i;
    const label = known ? tree.name(tree.at(cell.node, i + 1)) : "not answered";
    table.append(
      element(
        "tr",
        null,
        element("th", { title: label }, level, element("small", null, label)),
        ...shares.map((of) => {
          const share = of[i];
          if (share === null) return element("td", null, "–");
          return element("td", null, bar(share, tree.nodes[tree.at(cell.node, i + 1)].colour), element("span", { className: "figure" }, percent(share)));
        }),
      ),
    );
  });
  const study = facts.study >= 0 ? facts.columns[facts.study] : null;
  const lists = cell.found.map(([name, found]) =>
    element(
      "div",
      null,
      element("h3", null, name),
      study ? element("p", { className: "note" }, `${study.column.name}: ${new Set(found.rows.map((row) => columnValue(study, row))).size} of ${study.column.values?.length}`) : null,
      element("ol", null, ...found.rows.map((row, i) => {
        const button = element(
          "button",
          { title: tree.names(facts.node[row]).join(" › ") || "no label" },
          swatch(tree.nodes[facts.node[row]].colour),
          element("span", { className: "text" }, tree.name(facts.node[row]), study ? element("small", null, columnValue(study, row)) : null),
          element("span", { className: "figure" }, found.cosines[i].toFixed(3)),
        );
        button.addEventListener("click", () => pick(row));
        return element("li", null, button);
      })),
    ),
  );
  return [
    element("h2", null, swatch(tree.nodes[cell.node].colour), tree.name(cell.node)),
    element("p", { className: "note" }, cell.title),
    element("dl", null, ...cell.lines.flatMap(([name, value]) => [element("dt", null, name), element("dd", null, value)])),
    table,
    element("div", { className: "lists" }, ...lists),
    element("p", { className: "note" }, "Figures are cosines. Solid lines: neighbours by this prefix; dashed: by the vector as it came."),
  ];
}

const SHOWN = 8; // rows of a table

export interface Part {
  name: string;
  colour: string;
  cells: number;
  share: number;
  atlas: number; // share among all cells of the map
}

/** What a group consists of: counts in the group and on the whole map by code -> most cells first. */
export function parts(inside: ArrayLike<number>, all: ArrayLike<number>, name: (code: number) => string, colour: (code: number) => string): Part[] {
  const sum = (counts: ArrayLike<number>) => Array.from(counts).reduce((a, b) => a + b, 0);
  const [of, total] = [sum(inside), sum(all)];
  const found: Part[] = [];
  for (let code = 0; code < inside.length; code++) {
    if (inside[code]) found.push({ name: name(code), colour: colour(code), cells: inside[code], share: inside[code] / of, atlas: all[code] / total });
  }
  return found.sort((a, b) => b.cells - a.cells);
}

export function partsTable(title: string, rows: Part[]): HTMLElement {
  const table = element("table", { className: "parts" }, element("caption", null, title));
  table.append(element("tr", null, ...["", "Cells", "Group", "Atlas"].map((text) => element("th", null, text))));
  for (const row of rows.slice(0, SHOWN)) {
    table.append(
      element(
        "tr",
        null,
        element("th", { title: row.name }, row.name, bar(row.share, row.colour, row.atlas)),
        element("td", null, count(row.cells)),
        element("td", null, percent(row.share)),
        element("td", null, percent(row.atlas)),
      ),
    );
  }
  if (rows.length > SHOWN) {
    const rest = rows.slice(SHOWN).reduce((cells, row) => cells + row.cells, 0);
    table.append(element("tr", null, element("th", null, `${count(rows.length - SHOWN)} more`), element("td", null, count(rest)), element("td"), element("td")));
  }
  return table;
}

/** Codes of the rows -> how many have each. */
export function tally(codes: ArrayLike<number>, size: number, rows?: number[], map: (code: number) => number = (code) => code): Uint32Array {
  const counts = new Uint32Array(size);
  if (rows) for (const row of rows) counts[map(codes[row])]++;
  else for (let row = 0; row < codes.length; row++) counts[map(codes[row])]++;
  return counts;
}
