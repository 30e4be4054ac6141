// Where dropped cells lie on the map.

import { mean, median, sort } from "d3-array";
import { take } from "./matrix";
import type { Bank } from "./neighbours";

const NEIGHBOURS = 10; // cells of the map that decide on a position, as in `fractal map`

/** The mean of the half of the points that lies nearest to their median, as in `fractal map`. */
function amid(points: number[][]): number[] {
  const [x, y] = [0, 1].map((axis) => median(points, (point) => point[axis])!);
  const nearest = sort(points, (point) => Math.hypot(point[0] - x, point[1] - y)).slice(0, Math.ceil(points.length / 2));
  return [0, 1].map((axis) => mean(nearest, (point) => point[axis])!);
}

/**
 * Positions (n, 2) per prefix of cells full (n, width): amid the nearest cells of the map by that prefix. NaN for those
 * that are not drawn, and for cells without a usable vector.
 */
export function positions(
  full: Float32Array, drawn: boolean[], bank: Bank, widths: number[], layouts: Float32Array[],
): Float32Array[] {
  const { dim } = bank;
  const rows = [...drawn.keys()].filter((row) => drawn[row] && full[row * dim]);
  return bank.search(take(full, rows, dim), NEIGHBOURS, widths).map((neighbours, j) => {
    const result = new Float32Array(2 * drawn.length).fill(NaN);
    const at = (cell: number) => [layouts[j][2 * cell], layouts[j][2 * cell + 1]];
    neighbours.forEach((nearest, i) => result.set(amid(nearest.rows.map(at)), 2 * rows[i]));
    return result;
  });
}
