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
 * Scalar products of the rows of a (n, dim) and b (m, dim) by their first `width` numbers -> (n, m). Four rows of a at a
 * time, so that b is read a quarter as often.
 */
export function products(a: Float32Array, b: Float32Array, dim: number, width = dim): Float32Array {
  const [n, m] = [a.length / dim, b.length / dim];
  const sums = new Float32Array(n * m);
  for (let i = 0; i < n; i += 4) {
    const rows = [i, i + 1, i + 2, i + 3].map((row) => Math.min(row, n - 1)); // the last one again, where there are fewer
    const [a0, a1, a2, a3] = rows.map((row) => row * dim);
    for (let j = 0; j < m; j++) {
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let k = 0, at = j * dim; k < width; k++, at++) {
        s0 += a[a0 + k] * b[at];
        s1 += a[a1 + k] * b[at];
        s2 += a[a2 + k] * b[at];
        s3 += a[a3 + k] * b[at];
      }
      sums[rows[3] * m + j] = s3;
      sums[rows[2] * m + j] = s2;
      sums[rows[1] * m + j] = s1;
      sums[rows[0] * m + j] = s0;
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
