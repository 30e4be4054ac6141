// Exact nearest neighbours by cosine: every product is computed, the k largest are kept.

import { length, products } from "./matrix";

export interface Neighbours {
  rows: number[]; // nearest first
  cosines: number[];
}

/** Cells that can be searched by any prefix of their vectors. */
export class Bank {
  readonly n: number;
  private readonly lengths = new Map<number, Float64Array>(); // of the rows, by width

  /** rows (n, dim) of length 1 */
  constructor(readonly rows: Float32Array, readonly dim: number) {
    this.n = rows.length / dim;
  }

  /** The k cells nearest to each query (q, dim) by its first numbers, for each width; row `except` is left out. */
  search(queries: Float32Array, k: number, widths = [this.dim], except = -1): Neighbours[][] {
    const { n, dim, rows } = this;
    const count = queries.length / dim;
    const sums = new Float32Array(count * n);
    const cosines = new Float32Array(n);
    return widths.map((width, j) => {
      products(queries, rows, dim, sums, j ? widths[j - 1] : 0, width);
      if (!this.lengths.has(width)) {
        this.lengths.set(width, Float64Array.from({ length: n }, (_, i) => length(rows, i * dim, width)));
      }
      const lengths = this.lengths.get(width)!;
      return Array.from({ length: count }, (_, i) => {
        const norm = length(queries, i * dim, width);
        for (let row = 0; row < n; row++) cosines[row] = sums[i * n + row] / (norm * lengths[row] || 1);
        return largest(cosines, Math.min(k, n), except);
      });
    });
  }
}

/** The k largest cosines, largest first; of equal ones the first. */
function largest(cosines: Float32Array, k: number, except: number): Neighbours {
  const top: Neighbours = { rows: [], cosines: [] };
  let least = -Infinity;
  for (let row = 0; row < cosines.length; row++) {
    const value = cosines[row];
    if (row === except || (top.rows.length === k && !(value > least))) continue;
    let rank = Math.min(top.rows.length, k - 1);
    for (; rank > 0 && top.cosines[rank - 1] < value; rank--) {
      top.rows[rank] = top.rows[rank - 1];
      top.cosines[rank] = top.cosines[rank - 1];
    }
    [top.rows[rank], top.cosines[rank]] = [row, value];
    if (top.rows.length === k) least = top.cosines[k - 1];
  }
  return top;
}
