// Exact nearest neighbours by cosine: every product is computed, the k largest are kept.

export interface Found {
  rows: number[];
  cosines: number[];
}

/** The k largest of values[start .. start + count), largest first; of equal ones the first. */
export function largest(values: Float32Array, start: number, count: number, k: number, leaveOut = -1): Found {
  const rows: number[] = [];
  const cosines: number[] = [];
  let least = -Infinity;
  for (let i = 0; i < count; i++) {
    const value = values[start + i];
    if (i === leaveOut || (rows.length === k && !(value > least))) continue;
    let at = Math.min(rows.length, k - 1);
    for (; at > 0 && cosines[at - 1] < value; at--) {
      rows[at] = rows[at - 1];
      cosines[at] = cosines[at - 1];
    }
    rows[at] = i;
    cosines[at] = value;
    if (rows.length === k) least = cosines[k - 1];
  }
  return { rows, cosines };
}

/** Products of rows a (n, dim) and b (m, dim), float32 -> (n, m). */
export function products(a: Float32Array, n: number, b: Float32Array, m: number, dim: number): Float32Array {
  const out = new Float32Array(n * m);
  addProducts(out, a, n, b, m, dim, 0, dim);
  return out;
}

/** Adds those of the numbers from `first` to before `end`. Four rows of a at a time: b is read once for them. */
export function addProducts(
  out: Float32Array, a: Float32Array, n: number, b: Float32Array, m: number, dim: number, first: number, end: number,
): void {
  let i = 0;
  for (; i + 4 <= n; i += 4) {
    const a0 = i * dim, a1 = a0 + dim, a2 = a1 + dim, a3 = a2 + dim;
    for (let j = 0; j < m; j++) {
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let k = first, at = j * dim + first; k < end; k++, at++) {
        const value = b[at];
        s0 += a[a0 + k] * value;
        s1 += a[a1 + k] * value;
        s2 += a[a2 + k] * value;
        s3 += a[a3 + k] * value;
      }
      const to = i * m + j;
      out[to] += s0;
      out[to + m] += s1;
      out[to + 2 * m] += s2;
      out[to + 3 * m] += s3;
    }
  }
  for (; i < n; i++) {
    for (let j = 0; j < m; j++) {
      let sum = 0;
      for (let k = first, at = j * dim + first; k < end; k++, at++) sum += a[i * dim + k] * b[at];
      out[i * m + j] += sum;
    }
  }
}

/** Cells that can be searched by any prefix of their vectors. */
export class Bank {
  private readonly norms = new Map<number, Float64Array>();

  /** rows (n, dim) of length 1 */
  constructor(readonly rows: Float32Array, readonly n: number, readonly dim: number) {}

  row(i: number): Float32Array {
    return this.rows.subarray(i * this.dim, (i + 1) * this.dim);
  }

  /** Length of the first `width` numbers of each row. */
  lengths(width: number): Float64Array {
    let found = this.norms.get(width);
    if (!found) {
      found = new Float64Array(this.n);
      for (let i = 0; i < this.n; i++) {
        let square = 0;
        for (let k = i * this.dim; k < i * this.dim + width; k++) square += this.rows[k] * this.rows[k];
        found[i] = Math.sqrt(square);
      }
      this.norms.set(width, found);
    }
    return found;
  }

  /** The k cells nearest to `query` (dim,) by the first `width` numbers. */
  nearest(query: Float32Array, width: number, k: number, leaveOut = -1): Found {
    const lengths = this.lengths(width);
    let square = 0;
    for (let at = 0; at < width; at++) square += query[at] * query[at];
    const own = Math.sqrt(square);
    const cosines = new Float32Array(this.n);
    for (let i = 0; i < this.n; i++) {
      let sum = 0;
      for (let at = 0, from = i * this.dim; at < width; at++, from++) sum += query[at] * this.rows[from];
      cosines[i] = sum / (own * lengths[i] || 1);
    }
    return largest(cosines, 0, this.n, k, leaveOut);
  }
}
