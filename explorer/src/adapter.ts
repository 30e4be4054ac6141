// The forward pass of fractal/adapter.py's FractalAdapter, and the answers of fractal/reference/annotator.py.

import type { About, Knots, Matrix, Numbers } from "./data";
import { largest, products } from "./neighbours";

const SQRT_HALF = Math.SQRT1_2;

/** Abramowitz and Stegun 7.1.26, to 1.5e-7: as exact as float32. */
function erf(x: number): number {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const gelu = (x: number) => 0.5 * x * (1 + erf(x * SQRT_HALF));

/** Rows of length 1, in place; a row of zeros stays. */
function normalize(rows: Float32Array, dim: number): Float32Array {
  for (let from = 0; from < rows.length; from += dim) {
    let square = 0;
    for (let k = from; k < from + dim; k++) square += rows[k] * rows[k];
    const norm = Math.max(Math.sqrt(square), 1e-12);
    for (let k = from; k < from + dim; k++) rows[k] /= norm;
  }
  return rows;
}

function softmax(values: Float64Array): Float64Array {
  const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i] = Math.exp(values[i] - most);
  for (let i = 0; i < values.length; i++) values[i] /= sum;
  return values;
}

export interface Output {
  full: Float32Array; // (n, levels * scaleDim), of length 1
  logit: Float64Array; // (n,) the largest of the network
  probability: Float64Array; // (n,) the largest of a path
}

export type Arrays = Record<string, Matrix<Numbers>>;

export class Adapter {
  readonly dim: number;
  readonly width: number; // of the full vector
  private readonly array: Record<string, Float32Array> = {};
  private readonly paths: number;

  constructor(private readonly config: About["adapter"], arrays: Arrays) {
    for (const [name, matrix] of Object.entries(arrays)) this.array[name] = Float32Array.from(matrix.values);
    this.dim = arrays.mean.shape[0];
    this.paths = arrays.path_anchors.shape[0];
    this.width = config.levels * config.scaleDim;
    normalize(this.array.path_anchors, arrays.path_anchors.shape[1]);
    normalize(this.array.anchors, config.scaleDim);
  }

  private layer(x: Float32Array, n: number, name: string, bias?: string): Float32Array {
    const weight = this.array[name];
    const inputs = x.length / n;
    const outputs = weight.length / inputs;
    const y = products(x, n, weight, outputs, inputs);
    if (bias) for (let i = 0; i < y.length; i++) y[i] += this.array[bias][i % outputs];
    return y;
  }

  /** x (n, dim) */
  forward(x: Float32Array, n: number): Output {
    const { dim, config, paths } = this;
    const unit = normalize(x.slice(), dim);
    for (let i = 0; i < unit.length; i++) unit[i] -= this.array.mean[i % dim];
    const whitened = this.layer(unit, n, "axes");
    unit.set(whitened);
    normalize(unit, dim);
    const seen = unit.map((value) => value * Math.sqrt(dim));
    const linear = this.layer(seen, n, "linear");
    const one = this.layer(seen, n, "mlp_0_weight", "mlp_0_bias").map(gelu);
    const two = this.layer(one, n, "mlp_1_weight", "mlp_1_bias").map(gelu);
    const query = this.layer(two, n, "mlp_2_weight", "mlp_2_bias");
    for (let i = 0; i < query.length; i++) query[i] += linear[i];
    normalize(query, query.length / n);
    const cosines = this.layer(query, n, "path_anchors");
    const inner = this.layer(whitened, n, "class_means");
    const means = this.array.class_means;
    const squares = Float64Array.from({ length: paths }, (_, p) => {
      let sum = 0;
      for (let k = p * dim; k < (p + 1) * dim; k++) sum += means[k] * means[k];
      return sum;
    });
    const output: Output = {
      full: new Float32Array(n * this.width),
      logit: new Float64Array(n),
      probability: new Float64Array(n),
    };
    for (let i = 0; i < n; i++) {
      let own = 0;
      for (let k = i * dim; k < (i + 1) * dim; k++) own += whitened[k] * whitened[k];
      const distance = Float64Array.from({ length: paths }, (_, p) => own - 2 * inner[i * paths + p] + squares[p]);
      const nearest = distance.reduce((a, b) => Math.min(a, b), Infinity);
      const doubt = Math.max(1, nearest / config.familiar) ** 2; // temperature of a strange cell
      const logits = Float64Array.from({ length: paths }, (_, p) => cosines[i * paths + p] / config.tau);
      output.logit[i] = logits.reduce((a, b) => Math.max(a, b), -Infinity);
      const byNetwork = softmax(logits.map((value) => value / doubt));
      const byMeans = softmax(
        distance.map((d, p) => (this.array.log_prior[p] - d / (2 * config.meansTemperature)) / doubt),
      );
      const probability = byNetwork.map((p, k) => p + config.meansShare * (byMeans[k] - p));
      output.probability[i] = probability.reduce((a, b) => Math.max(a, b), 0);
      this.blocks(probability, unit.subarray(i * dim, (i + 1) * dim), output.full.subarray(i * this.width));
    }
    normalize(output.full, this.width);
    return output;
  }

  /** Path probabilities and the whitened cell of length 1 -> its blocks, into `out`. */
  private blocks(probability: Float64Array, unit: Float32Array, out: Float32Array): void {
    const { levels, scaleDim, classes, blockScale, residualScale, sharpness } = this.config;
    const kept = Math.min(scaleDim, Math.ceil(this.dim / levels)); // numbers of the cell that a block shows
    let before = 0;
    for (let j = 0; j < levels; j++) {
      const told = new Float64Array(classes[j]);
      for (let p = 0; p < probability.length; p++) told[this.array.paths[p * levels + j]] += probability[p];
      let sum = 0;
      for (let c = 0; c < told.length; c++) sum += told[c] = (told[c] + 1e-9) ** sharpness[j];
      for (let k = 0; k < scaleDim; k++) {
        let value = 0;
        for (let c = 0; c < told.length; c++) {
          value += (told[c] / Math.max(sum, 1e-12)) * this.array.anchors[(before + c) * scaleDim + k];
        }
        const from = (levels - 1 - j) * kept + k; // the first numbers stand in the last block
        const slice = k < kept && from < this.dim ? unit[from] : 0;
        out[j * scaleDim + k] = blockScale[j] * value + residualScale[j] * slice;
      }
      before += classes[j];
    }
  }
}

/** What is said of n cells, as `fractal annotate` says it. */
export interface Answers {
  n: number;
  full: Float32Array; // (n, width)
  path: Int32Array; // -1: no usable vector
  probability: Float64Array; // (n, levels)
  confidentDepth: Uint8Array;
  depth: Uint8Array;
  pValue: Float64Array;
  novel: Uint8Array;
}

function interpolate(x: number, [at, values]: Knots): number {
  if (!(x > at[0])) return values[0];
  const last = at.length - 1;
  if (x >= at[last]) return values[last];
  const high = lowerBound(at, x);
  return at[high] === x
    ? values[high]
    : values[high - 1] + ((values[high] - values[high - 1]) / (at[high] - at[high - 1])) * (x - at[high - 1]);
}

/** The first place whose value is at least x. */
function lowerBound(sorted: ArrayLike<number>, x: number): number {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Conformal p-value: the share, by weight, of held-out values that are at least as large. */
class Tail {
  private readonly atLeast: Float64Array;
  private readonly mean: number;

  constructor(private readonly values: Float64Array, weights: Float64Array) {
    this.atLeast = new Float64Array(weights.length + 1);
    for (let i = weights.length - 1; i >= 0; i--) this.atLeast[i] = this.atLeast[i + 1] + weights[i];
    this.mean = this.atLeast[0] / weights.length;
  }

  at(x: number): number {
    return (this.atLeast[lowerBound(this.values, x)] + this.mean) / (this.atLeast[0] + this.mean);
  }
}

const BATCH = 64; // cells at a time; their cosines to 8,000 cells are 2 MB

export class Annotator {
  private readonly signals: Tail[];
  private readonly ood: Tail;
  private readonly children: number[][][]; // per level: nodes below a node

  constructor(
    readonly adapter: Adapter,
    private readonly config: About["annotator"],
    nodes: number,
    private readonly bank: Float32Array,
    private readonly bankPath: Numbers,
    private readonly whiten: Float64Array, // (dim, dim), one output a row
    private readonly means: Float64Array, // (paths, dim), whitened
    signals: Matrix<Float64Array>,
    weights: Float64Array,
    ood: [Float64Array, Float64Array],
  ) {
    const [count, knots] = signals.shape;
    const column = (of: Float64Array, i: number) => of.subarray(i * knots, (i + 1) * knots);
    this.signals = Array.from({ length: count }, (_, i) => new Tail(column(signals.values, i), column(weights, i)));
    this.ood = new Tail(...ood);
    this.children = config.paths[0].map((_, k) => {
      const below: Set<number>[] = Array.from({ length: nodes }, () => new Set());
      for (const path of config.paths) below[k ? path[k - 1] : 0].add(path[k]);
      return below.map((some) => [...some].sort((a, b) => a - b));
    });
  }

  get cells(): number {
    return this.bankPath.length;
  }

  /** vectors (n, dim), of any kind; `progress` is told how many are done, and may stop it by returning false. */
  async answer(
    vectors: Float32Array,
    n: number,
    progress: (done: number) => boolean | Promise<boolean>,
  ): Promise<Answers | null> {
    const { dim, width } = this.adapter;
    const levels = this.config.paths[0].length;
    const answers: Answers = {
      n,
      full: new Float32Array(n * width),
      path: new Int32Array(n).fill(-1),
      probability: new Float64Array(n * levels).fill(NaN),
      confidentDepth: new Uint8Array(n),
      depth: new Uint8Array(n),
      pValue: new Float64Array(n).fill(NaN),
      novel: new Uint8Array(n),
    };
    for (let start = 0; start < n; start += BATCH) {
      const rows: number[] = [];
      for (let i = start; i < Math.min(n, start + BATCH); i++) {
        const row = vectors.subarray(i * dim, (i + 1) * dim);
        if (row.every(Number.isFinite) && row.some((value) => value !== 0)) rows.push(i);
      }
      if (rows.length) this.some(vectors, rows, answers, levels);
      if (!(await progress(Math.min(n, start + BATCH)))) return null;
    }
    return answers;
  }

  private some(vectors: Float32Array, rows: number[], answers: Answers, levels: number): void {
    const { adapter, config } = this;
    const { dim, width } = adapter;
    const x = new Float32Array(rows.length * dim);
    rows.forEach((row, i) => x.set(vectors.subarray(row * dim, (row + 1) * dim), i * dim));
    const output = adapter.forward(x, rows.length);
    const cosines = products(output.full, rows.length, this.bank, this.cells, width);
    rows.forEach((row, i) => {
      answers.full.set(output.full.subarray(i * width, (i + 1) * width), row * width);
      const found = largest(cosines, i * this.cells, this.cells, Math.min(config.neighbours, this.cells));
      const votes = softmax(Float64Array.from(found.cosines, (cosine) => cosine / config.temperature));
      const { path, shares } = this.descend(found.rows.map((cell) => this.bankPath[cell]), votes);
      answers.path[row] = path;
      let least = 1;
      for (let k = 0; k < levels; k++) {
        least = Math.min(least, interpolate(shares[k], config.votes[k]));
        answers.probability[row * levels + k] = least;
        if (least >= config.confidence) answers.confidentDepth[row] = k + 1;
      }
      const own = x.subarray(i * dim, (i + 1) * dim);
      const signals = [this.mahalanobis(own, path), -output.logit[i], -Math.log(output.probability[i])];
      const score = -signals.reduce((sum, value, k) => sum + Math.log(this.signals[k].at(value)), 0);
      const pValue = this.ood.at(score);
      const confident = answers.confidentDepth[row];
      answers.pValue[row] = pValue;
      answers.depth[row] = pValue < config.caution ? Math.min(confident, config.cautiousDepth) : confident;
      answers.novel[row] = Number(pValue < config.novel);
    });
  }

  /** The paths of the neighbours and their votes -> from the root down, the child with most votes. */
  private descend(paths: number[], votes: Float64Array): { path: number; shares: number[] } {
    const sums = new Map<number, number>();
    paths.forEach((path, i) => {
      for (const node of this.config.paths[path]) sums.set(node, (sums.get(node) ?? 0) + votes[i]);
    });
    let node = 0;
    const shares = this.children.map((below) => {
      const best = below[node].reduce((a, b) => ((sums.get(b) ?? 0) > (sums.get(a) ?? 0) ? b : a));
      node = best;
      return sums.get(best) ?? 0;
    });
    const last = shares.length - 1;
    return { path: this.config.paths.findIndex((path) => path[last] === node), shares };
  }

  private mahalanobis(x: Float32Array, path: number): number {
    const { dim } = this.adapter;
    let square = 0;
    for (let k = 0; k < dim; k++) square += x[k] * x[k];
    const norm = Math.sqrt(square);
    let total = 0;
    for (let o = 0; o < dim; o++) {
      let sum = 0;
      for (let k = 0; k < dim; k++) sum += (x[k] / norm) * this.whiten[o * dim + k];
      total += (sum - this.means[path * dim + o]) ** 2;
    }
    return Math.sqrt(total);
  }
}
