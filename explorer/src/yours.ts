// Cells that were dropped on the page: their answers, their places on the map, and the table to take home.

import type { Answers } from "./adapter";
import type { About } from "./data";
import { csvRow } from "./dom";
import { addProducts, type Bank, largest } from "./neighbours";
import type { Tree } from "./tree";

export const STATUSES = ["ok", "withheld", "novel", "invalid"] as const;
export type Status = (typeof STATUSES)[number];

export interface Yours {
  file: string;
  names: string[] | null;
  vectors: Float32Array; // (n, dim), as they came
  answers: Answers;
  node: Int32Array; // the deepest node that can be trusted; 0 for none
  layouts: Float32Array[]; // (n, 2) per prefix
}

export function statusOf(answers: Answers, i: number): Status {
  if (answers.path[i] < 0) return "invalid";
  if (answers.novel[i]) return "novel";
  return answers.depth[i] < answers.confidentDepth[i] ? "withheld" : "ok";
}

export function nodesOf(answers: Answers, paths: number[][]): Int32Array {
  return Int32Array.from(answers.path, (path, i) => (path < 0 || !answers.depth[i] ? 0 : paths[path][answers.depth[i] - 1]));
}

const PLACED_BY = 10; // cells of the map, as in fractal/maps.py
const BATCH = 64;

/**
 * full (n, width) -> (n, 2) per prefix: the median place, axis by axis, of the nearest cells of the map by that prefix.
 * A cell without a vector has none.
 */
export async function placed(
  full: Float32Array,
  n: number,
  bank: Bank,
  widths: number[],
  maps: Float32Array[],
  path: Int32Array,
  progress: (done: number) => boolean | Promise<boolean>,
): Promise<Float32Array[] | null> {
  const layouts = maps.map(() => new Float32Array(2 * n).fill(NaN));
  for (let start = 0; start < n; start += BATCH) {
    const some = Math.min(BATCH, n - start);
    const rows = full.subarray(start * bank.dim, (start + some) * bank.dim);
    const sums = new Float32Array(some * bank.n);
    const cosines = new Float32Array(bank.n);
    widths.forEach((width, j) => {
      addProducts(sums, rows, some, bank.rows, bank.n, bank.dim, j ? widths[j - 1] : 0, width);
      const lengths = bank.lengths(width);
      for (let i = 0; i < some; i++) {
        if (path[start + i] < 0) continue;
        for (let cell = 0; cell < bank.n; cell++) cosines[cell] = sums[i * bank.n + cell] / lengths[cell];
        const near = largest(cosines, 0, bank.n, Math.min(PLACED_BY, bank.n)).rows;
        for (let axis = 0; axis < 2; axis++) {
          layouts[j][2 * (start + i) + axis] = median(near.map((row) => maps[j][2 * row + axis]));
        }
      }
    });
    if (!(await progress(start + some))) return null;
  }
  return layouts;
}

function median(values: number[]): number {
  const sorted = values.sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

/** The columns of `fractal annotate`, as far as the page knows them. */
export function asCsv(yours: Yours, about: About, tree: Tree): string {
  const { levels } = about;
  const { answers } = yours;
  const names = ["cell_id", "level", "label", "cl_id", ...levels.flatMap((l) => [l, `${l}_cl_id`, `${l}_probability`]), "p_value", "status"];
  const rows = Array.from({ length: answers.n }, (_, i) => {
    const depth = answers.depth[i];
    const node = yours.node[i];
    const path = answers.path[i] < 0 ? null : about.annotator.paths[answers.path[i]];
    return csvRow([
      yours.names ? yours.names[i] : String(i),
      depth ? levels[depth - 1] : "none",
      node ? tree.name(node) : "",
      tree.nodes[node].id,
      ...levels.flatMap((_, k) => [
        path ? tree.name(path[k]) : "",
        path ? tree.nodes[path[k]].id : "",
        Number(answers.probability[i * levels.length + k].toPrecision(6)),
      ]),
      Number(answers.pValue[i].toPrecision(6)),
      statusOf(answers, i),
    ]);
  });
  return csvRow(names) + rows.join("");
}
