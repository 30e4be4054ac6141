// Groups of cells on the map: each where most of its cells lie.

import { group, median } from "d3-array";

export interface Island {
  name: string;
  count: number;
  x: number;
  y: number;
  radius: number; // of the circle around (x, y) that holds half of its cells
}

const SIDE = 0.12; // of a square of the grid, in units of the map, which reaches from -1 to 1

/** Largest group first: layout (n, 2), groups (n,). Groups of fewer than `least` cells, and group 0, have no name. */
export function islands(layout: Float32Array, groups: ArrayLike<number>, least: number, nameOf: (group: number) => string): Island[] {
  const members = [...group(Array.from(groups, (_, row) => row), (row) => groups[row])];
  return members
    .filter(([node, rows]) => node && rows.length >= least)
    .map(([node, rows]) => ({ name: nameOf(node), count: rows.length, ...densest(layout, rows) }))
    .sort((a, b) => b.count - a.count);
}

/** How many lie apart: no other one has its middle among the nearer half of their cells. */
export function apart(all: Island[]): number {
  return all.filter((a) => all.every((b) => a === b || Math.hypot(a.x - b.x, a.y - b.y) > a.radius)).length;
}

/** Start at the fullest square of the grid, and move three times to the mean of the cells near by. */
function densest(layout: Float32Array, rows: number[]): { x: number; y: number; radius: number } {
  const points = rows.map((row) => [layout[2 * row], layout[2 * row + 1]]);
  const squares = [...group(points, ([x, y]) => 1024 * Math.floor(x / SIDE) + Math.floor(y / SIDE)).values()];
  let near = squares.reduce((fullest, square) => (square.length > fullest.length ? square : fullest));
  let [x, y] = [0, 0];
  for (let step = 0; step < 4 && near.length; step++) {
    [x, y] = [0, 1].map((axis) => near.reduce((sum, point) => sum + point[axis], 0) / near.length);
    near = points.filter((point) => Math.hypot(point[0] - x, point[1] - y) < 0.17);
  }
  return { x, y, radius: median(points, (point) => Math.hypot(point[0] - x, point[1] - y))! };
}
