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
export const MOST = 20_000; // cells that are drawn
const BATCH = 64;

/** The mean of the half of the points that lies nearest to their median, as in `fractal map`. */
function amid(points: number[][]): number[] {
  const [x, y] = [0, 1].map((axis) => median(points, (point) => point[axis])!);
  const nearest = sort(points, (point) => Math.hypot(point[0] - x, point[1] - y)).slice(0, Math.ceil(points.length / 2));
  return [0, 1].map((axis) => mean(nearest, (point) => point[axis])!);
}

/**
 * Positions (n, 2) per prefix of cells full (n, width): amid the nearest cells of the map by that prefix. NaN for a cell
 * without a usable vector, and, of more than MOST cells, for those that are not drawn. null: `progress` stopped the work.
 */
export async function positions(
  full: Float32Array, bank: Bank, widths: number[], layouts: Float32Array[], progress: (share: number) => Promise<boolean>,
): Promise<Float32Array[] | null> {
  const { dim } = bank;
  const n = full.length / dim;
  const result = layouts.map(() => new Float32Array(2 * n).fill(NaN));
  const step = Math.max(1, n / MOST);
  const drawn = Array.from({ length: Math.floor(n / step) }, (_, i) => Math.floor(i * step)).filter((row) => full[row * dim]);
  for (let start = 0; start < drawn.length; start += BATCH) {
    const rows = drawn.slice(start, start + BATCH);
    const batch = new Float32Array(rows.length * dim);
    rows.forEach((row, i) => batch.set(full.subarray(row * dim, (row + 1) * dim), i * dim));
    bank.search(batch, NEIGHBOURS, widths).forEach((neighbours, j) => {
      const at = (cell: number) => [layouts[j][2 * cell], layouts[j][2 * cell + 1]];
      neighbours.forEach((nearest, i) => result[j].set(amid(nearest.rows.map(at)), 2 * rows[i]));
    });
    if (!(await progress(start / drawn.length))) return null;
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
