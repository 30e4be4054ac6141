// Cells that were dropped on the page: their positions on the map, and their answers as a table.

import { mean, median, sort } from "d3-array";
import { type Answers, STATUSES } from "./annotator";
import type { About, CellSet } from "./data";
import { downloadCsv } from "./format";
import type { Bank } from "./neighbours";
import type { Tree } from "./tree";

export interface Yours extends CellSet {
  file: string;
  what: string; // was read of it
  problems: Problem[];
  raw: Float32Array; // (n, dim) as they came
  full: Float32Array; // (n, width) fractal vectors
  answers: Answers;
}

/** Cells that get no answer, and why. */
export interface Problem {
  why: string;
  cells: number;
}

/** vectors (n, dim) */
export function problemsOf(vectors: Float32Array, dim: number): Problem[] {
  const cells = { "missing numbers": 0, "infinite numbers": 0, "zeros alone": 0 };
  for (let start = 0; start < vectors.length; start += dim) {
    const cell = vectors.subarray(start, start + dim);
    if (cell.some(Number.isNaN)) cells["missing numbers"]++;
    else if (!cell.every(Number.isFinite)) cells["infinite numbers"]++;
    else if (!cell.some(Boolean)) cells["zeros alone"]++;
  }
  return Object.entries(cells).flatMap(([why, n]) => (n ? [{ why, cells: n }] : []));
}

/** The deepest node that is answered for each cell, 0 for none. */
export function nodesOf({ path, depth }: Answers, paths: number[][]): Uint32Array {
  return Uint32Array.from(path, (p, row) => (p < 0 || !depth[row] ? 0 : paths[p][depth[row] - 1]));
}

const NEIGHBOURS = 10; // cells of the map that decide on a position, as in `fractal map`
const BATCH = 64;

/** The mean of the half of the points that lies nearest to their median, as in `fractal map`. */
function amid(points: number[][]): number[] {
  const [x, y] = [0, 1].map((axis) => median(points, (point) => point[axis])!);
  const nearest = sort(points, (point) => Math.hypot(point[0] - x, point[1] - y)).slice(0, Math.ceil(points.length / 2));
  return [0, 1].map((axis) => mean(nearest, (point) => point[axis])!);
}

/**
 * Positions (n, 2) per prefix of cells full (n, width): amid the nearest cells of the map by that prefix. A cell without a usable vector has NaN. null: `progress` stopped the work.
 */
export async function positions(
  full: Float32Array, bank: Bank, widths: number[], layouts: Float32Array[], progress: (done: number) => Promise<boolean>,
): Promise<Float32Array[] | null> {
  const n = full.length / bank.dim;
  const result = layouts.map(() => new Float32Array(2 * n).fill(NaN));
  for (let start = 0; start < n; start += BATCH) {
    const batch = full.subarray(start * bank.dim, (start + BATCH) * bank.dim);
    widths.forEach((width, j) => {
      bank.search(batch, Math.min(NEIGHBOURS, bank.n), width).forEach(({ rows }, i) => {
        if (batch.subarray(i * bank.dim, (i + 1) * bank.dim).every((value) => value === 0)) return;
        result[j].set(amid(rows.map((row) => [layouts[j][2 * row], layouts[j][2 * row + 1]])), 2 * (start + i));
      });
    });
    if (!(await progress(Math.min(n, start + BATCH)))) return null;
  }
  return result;
}

/** Save the columns of `fractal annotate`, as far as the page knows them. */
export function save({ answers, names, node }: Yours, { levels, annotator }: About, tree: Tree): void {
  const ofLevels = levels.flatMap((level) => [level, `${level}_cl_id`, `${level}_probability`]);
  const digits = (value: number) => Number(value.toPrecision(6));
  const rows = Array.from(node, (deepest, i) => {
    const path = annotator.paths[answers.path[i]] ?? levels.map(() => 0); // the root has no name
    const labels = path.flatMap((step, k) => {
      return [tree.nodes[step].name, tree.nodes[step].id, digits(answers.probability[i * levels.length + k])];
    });
    const { name, id } = tree.nodes[deepest];
    const level = answers.depth[i] ? levels[answers.depth[i] - 1] : "none";
    return [names ? names[i] : String(i), level, name, id, ...labels, digits(answers.pValue[i]), STATUSES[answers.status[i]]];
  });
  downloadCsv("labels.csv", ["cell_id", "level", "label", "cl_id", ...ofLevels, "p_value", "status"], rows);
}
