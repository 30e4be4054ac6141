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
  let i = 0;
  for (; i + 4 <= n; i += 4) {
    const [a0, a1, a2, a3] = [i * dim, (i + 1) * dim, (i + 2) * dim, (i + 3) * dim];
    for (let j = 0, to = i * m; j < m; j++, to++) {
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let k = first, at = j * dim + first; k < end; k++, at++) {
        const value = b[at];
        s0 += a[a0 + k] * value;
        s1 += a[a1 + k] * value;
        s2 += a[a2 + k] * value;
        s3 += a[a3 + k] * value;
      }
      sums[to] += s0;
      sums[to + m] += s1;
      sums[to + 2 * m] += s2;
      sums[to + 3 * m] += s3;
    }
  }
  for (; i < n; i++) addRow(sums.subarray(i * m, (i + 1) * m), a.subarray(i * dim, (i + 1) * dim), b, first, end);
  return sums;
}

/** As `products`, of one row; apart, so that the browser compiles both well. */
function addRow(sums: Float32Array, row: Float32Array, b: Float32Array, first: number, end: number): void {
  for (let j = 0; j < sums.length; j++) {
    let sum = 0;
    for (let k = first, at = j * row.length + first; k < end; k++, at++) sum += row[k] * b[at];
    sums[j] += sum;
  }
}

export function softmax(values: Float64Array): Float64Array {
  const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = values.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}
