// Arithmetic on rows of float32: matrices lie in one array, row after row.

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
 * before `end`. Four rows of a at a time, so that b is read a quarter as often.
 */
export function products(
  a: Float32Array, b: Float32Array, dim: number, sums = new Float32Array((a.length * b.length) / dim ** 2), first = 0, end = dim,
): Float32Array {
  const [n, m] = [a.length / dim, b.length / dim];
  for (let i = 0; i < n; i += 4) {
    const [a0, a1, a2, a3] = [i, i + 1, i + 2, i + 3].map((row) => Math.min(row, n - 1) * dim);
    for (let j = 0; j < m; j++) {
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let k = first, at = j * dim + first; k < end; k++, at++) {
        s0 += a[a0 + k] * b[at];
        s1 += a[a1 + k] * b[at];
        s2 += a[a2 + k] * b[at];
        s3 += a[a3 + k] * b[at];
      }
      sums[i * m + j] += s0;
      if (i + 1 < n) sums[(i + 1) * m + j] += s1;
      if (i + 2 < n) sums[(i + 2) * m + j] += s2;
      if (i + 3 < n) sums[(i + 3) * m + j] += s3;
    }
  }
  return sums;
}

export function softmax(values: Float64Array): Float64Array {
  const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = values.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}
