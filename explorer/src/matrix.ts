// Arithmetic on rows of float32: matrices lie in one array, row after row.

export const rowOf = (rows: Float32Array, row: number, dim: number) => rows.subarray(row * dim, (row + 1) * dim);

/** Some of the rows, one after the other. */
export function take(rows: Float32Array, some: number[], dim: number): Float32Array {
  const taken = new Float32Array(some.length * dim);
  some.forEach((row, i) => taken.set(rowOf(rows, row, dim), i * dim));
  return taken;
}

/** Rows of length 1, in place; a row of zeros stays. */
export function normalize(rows: Float32Array, dim: number): Float32Array {
  for (let start = 0; start < rows.length; start += dim) {
    const norm = Math.max(length(rows, start, dim), 1e-12);
    for (let k = start; k < start + dim; k++) rows[k] /= norm;
  }
  return rows;
}

/** Euclidean length of `width` numbers from `start` on. */
export function length(values: Float32Array, start: number, width: number): number {
  let square = 0;
  for (let k = start; k < start + width; k++) square += values[k] * values[k];
  return Math.sqrt(square);
}

/**
 * Add to `sums` (n, m) the scalar products of the rows of a (n, dim) and b (m, dim), of their numbers from `first` to
 * before `end`. Four rows of a and two of b at a time: a number that is read serves several products, and b is read once.
 */
export function products(
  a: Float32Array, b: Float32Array, dim: number,
  sums: Float32Array = new Float32Array((a.length * b.length) / dim ** 2), first = 0, end = dim,
): Float32Array {
  const n = a.length / dim;
  const m = b.length / dim;
  for (let j = 0; j < m; j += 2) {
    const b0 = j * dim;
    const b1 = Math.min(j + 1, m - 1) * dim; // past the last row: that one again, and its sums are not kept
    for (let i = 0; i < n; i += 4) {
      const a0 = i * dim;
      const a1 = Math.min(i + 1, n - 1) * dim;
      const a2 = Math.min(i + 2, n - 1) * dim;
      const a3 = Math.min(i + 3, n - 1) * dim;
      let s00 = 0, s01 = 0, s10 = 0, s11 = 0, s20 = 0, s21 = 0, s30 = 0, s31 = 0;
      for (let k = first; k < end; k++) {
        const y0 = b[b0 + k], y1 = b[b1 + k];
        const x0 = a[a0 + k], x1 = a[a1 + k], x2 = a[a2 + k], x3 = a[a3 + k];
        s00 += x0 * y0;
        s01 += x0 * y1;
        s10 += x1 * y0;
        s11 += x1 * y1;
        s20 += x2 * y0;
        s21 += x2 * y1;
        s30 += x3 * y0;
        s31 += x3 * y1;
      }
      const add = (row: number, left: number, right: number) => {
        if (row >= n) return;
        sums[row * m + j] += left;
        if (j + 1 < m) sums[row * m + j + 1] += right;
      };
      add(i, s00, s01);
      add(i + 1, s10, s11);
      add(i + 2, s20, s21);
      add(i + 3, s30, s31);
    }
  }
  return sums;
}

/** a (n, dim), b (m, dim) -> (n, m) squared distances. */
export function squaredDistances(a: Float32Array, b: Float32Array, dim: number): Float32Array {
  const squares = (rows: Float32Array) => Float32Array.from({ length: rows.length / dim }, (_, i) => length(rows, i * dim, dim) ** 2);
  const [ofA, ofB] = [squares(a), squares(b)];
  return products(a, b, dim).map((product, i) => Math.max(0, ofA[Math.floor(i / ofB.length)] - 2 * product + ofB[i % ofB.length]));
}

export function softmax(values: Float64Array): Float64Array {
  const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = values.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}
