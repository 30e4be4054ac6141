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
 * Positions (n, 2) per layout of some rows of cells (n, dim), NaN for the others: amid the nearest cells of the map by
 * the layout's width, how many of their first numbers count.
 */
export function positions(
  cells: Float32Array, rows: number[], bank: Bank, widths: number[], layouts: Float32Array[],
): Float32Array[] {
  const { dim } = bank;
  return bank.search(take(cells, rows, dim), NEIGHBOURS, widths).map((neighbours, j) => {
    const result = new Float32Array((2 * cells.length) / dim).fill(NaN);
    const at = (cell: number) => [layouts[j][2 * cell], layouts[j][2 * cell + 1]];
    neighbours.forEach((nearest, i) => result.set(amid(nearest.rows.map(at)), 2 * rows[i]));
    return result;
  });
}
