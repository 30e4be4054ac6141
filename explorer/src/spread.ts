// Cells that lie on one another are spread, so that one dot is one cell: the more there are, the wider.

import { randomLcg, randomNormal } from "d3-random";

/** Layout (n, 2) -> the same with a little noise where more than one cell lies within a disc; `side`: of the disc. */
export function spread(layout: Float32Array, side: number): Float32Array {
  const n = layout.length / 2;
  const squares = Int32Array.from({ length: n }, (_, row) => {
    return 1024 * Math.floor(layout[2 * row] / side) + Math.floor(layout[2 * row + 1] / side);
  });
  const counts = new Map<number, number>();
  for (const square of squares) counts.set(square, (counts.get(square) ?? 0) + 1);
  const noise = randomNormal.source(randomLcg(0))(0, 1); // the same for each prefix: neighbours stay together
  const steps = Float32Array.from(layout, noise);
  return layout.map((value, i) => value + 0.35 * side * Math.sqrt(counts.get(squares[i >> 1])! - 1) * steps[i]);
}
