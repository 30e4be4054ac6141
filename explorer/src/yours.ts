// Cells that were dropped on the page: their answers, their places on the map, and the table to take home.

import type { Answers } from "./adapter";
import type { About } from "./data";
import { csvRow } from "./dom";
import { type Bank, largest, products } from "./neighbours";
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

const ANCHORS = 5; // cells of the map that a new cell is placed among
const SHARP = 0.02; // cosines that far apart weigh e times less
const BATCH = 64;

/** full (n, width) -> (n, 2) per prefix: among the nearest cells of the map. A cell without a vector is out of sight. */
export async function placed(
  full: Float32Array,
  n: number,
  bank: Bank,
  maps: Float32Array[],
  path: Int32Array,
  progress: (done: number) => boolean | Promise<boolean>,
): Promise<Float32Array[] | null> {
  const layouts = maps.map(() => new Float32Array(2 * n).fill(NaN));
  for (let start = 0; start < n; start += BATCH) {
    const some = Math.min(BATCH, n - start);
    const cosines = products(full.subarray(start * bank.dim, (start + some) * bank.dim), some, bank.rows, bank.n, bank.dim);
    for (let i = 0; i < some; i++) {
      if (path[start + i] < 0) continue;
      const near = largest(cosines, i * bank.n, bank.n, Math.min(ANCHORS, bank.n));
      const weights = near.cosines.map((cosine) => Math.exp((cosine - near.cosines[0]) / SHARP));
      const total = weights.reduce((a, b) => a + b, 0);
      maps.forEach((map, j) => {
        for (let axis = 0; axis < 2; axis++) {
          layouts[j][2 * (start + i) + axis] = near.rows.reduce((sum, row, k) => sum + weights[k] * map[2 * row + axis], 0) / total;
        }
      });
    }
    if (!(await progress(start + some))) return null;
  }
  return layouts;
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
