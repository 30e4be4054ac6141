// The forward pass of the package's FractalAdapter, in float32: vectors of the embedding -> fractal vectors.

import type { About, Matrix } from "./data";
import { normalize, products, rowOf, softmax, squaredDistances } from "./matrix";

/** Abramowitz and Stegun 7.1.26, to 1.5e-7: as exact as float32. */
function erf(x: number): number {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const gelu = (x: number) => 0.5 * x * (1 + erf(x * Math.SQRT1_2));

/** Rows (n, shift.length), each plus the shift. */
const plus = (rows: Float32Array, shift: Float32Array) => rows.map((value, i) => value + shift[i % shift.length]);

export class Adapter {
  readonly dim: number; // of the embedding
  readonly width: number; // of the full vector
  private readonly weights: Record<string, Float32Array> = {};
  private readonly paths: number;
  private readonly anchors: Float32Array[]; // per level (scaleDim, classes)

  constructor(private readonly config: About["adapter"], arrays: Record<string, Matrix>) {
    const { classes, levels, scaleDim } = config;
    for (const [name, { values }] of Object.entries(arrays)) this.weights[name] = Float32Array.from(values);
    this.dim = arrays.mean.shape[0];
    this.width = levels * scaleDim;
    this.paths = arrays.path_anchors.shape[0];
    normalize(this.weights.path_anchors, arrays.path_anchors.shape[1]);
    const anchors = normalize(this.weights.anchors, scaleDim);
    let before = 0; // anchors of the levels above
    this.anchors = classes.map((count) => {
      const first = before;
      before += count;
      return Float32Array.from({ length: count * scaleDim }, (_, i) => anchors[(first + (i % count)) * scaleDim + Math.floor(i / count)]);
    });
  }

  /** x (n, dim) -> the full vectors (n, width), of length 1 */
  forward(x: Float32Array): Float32Array {
    const { config, dim, paths, weights } = this;
    const centred = plus(normalize(x.slice(), dim), weights.mean.map((value) => -value));
    const whitened = products(centred, weights.axes, dim);
    const unit = normalize(whitened.slice(), dim);
    const cosines = products(this.query(unit), weights.path_anchors, weights.path_anchors.length / paths);
    const distances = squaredDistances(whitened, weights.class_means, dim);
    const probability = new Float64Array(cosines.length); // (n, paths)
    for (let i = 0; i < x.length / dim; i++) {
      const logits = Float64Array.from(rowOf(cosines, i, paths), (cosine) => cosine / config.tau);
      probability.set(this.probabilities(logits, Float64Array.from(rowOf(distances, i, paths))), i * paths);
    }
    return this.join(probability, unit);
  }

  /** The perceptron, with a linear map beside it: whitened cells of length 1 (n, dim) -> (n, query) of length 1. */
  private query(unit: Float32Array): Float32Array {
    const { dim, weights } = this;
    const entries = unit.map((value) => value * Math.sqrt(dim)); // of about 1
    const hidden = weights.mlp_0_bias.length;
    const first = plus(products(entries, weights.mlp_0_weight, dim), weights.mlp_0_bias).map(gelu);
    const second = plus(products(first, weights.mlp_1_weight, hidden), weights.mlp_1_bias).map(gelu);
    const linear = products(entries, weights.linear, dim);
    return normalize(plus(products(second, weights.mlp_2_weight, hidden, linear), weights.mlp_2_bias), weights.mlp_2_bias.length);
  }

  /** Of each path: the network's, averaged with those of the (squared) distances to the class means. */
  private probabilities(logits: Float64Array, distances: Float64Array): Float64Array {
    const { typicalDistance, meansTemperature, meansShare } = this.config;
    const nearest = distances.reduce((a, b) => Math.min(a, b));
    const temperature = Math.max(1, nearest / typicalDistance) ** 2; // higher in a cell that is far from all means
    const byNetwork = softmax(logits.map((logit) => logit / temperature));
    const prior = this.weights.log_prior;
    const byMeans = softmax(distances.map((distance, p) => (prior[p] - distance / (2 * meansTemperature)) / temperature));
    return byNetwork.map((share, p) => share + meansShare * (byMeans[p] - share));
  }

  /** Probabilities of the paths (n, paths), and the whitened cells of length 1 (n, dim) -> the full vectors (n, width). */
  private join(probability: Float64Array, unit: Float32Array): Float32Array {
    const { dim, paths, width } = this;
    const { levels, scaleDim, classes, blockScale, residualScale, sharpness } = this.config;
    const full = new Float32Array((probability.length / paths) * width);
    const kept = Math.min(scaleDim, Math.ceil(dim / levels)); // numbers of the cell in a block
    classes.forEach((count, j) => {
      const shares = new Float64Array((full.length / width) * count).fill(1e-9); // of the classes
      probability.forEach((share, i) => (shares[Math.floor(i / paths) * count + this.weights.paths[(i % paths) * levels + j]] += share));
      const sharp = Float32Array.from(shares, (share) => share ** sharpness[j]);
      const sums = Float32Array.from({ length: sharp.length / count }, (_, i) => rowOf(sharp, i, count).reduce((a, b) => a + b));
      products(sharp, this.anchors[j], count).forEach((anchor, i) => {
        const [row, k] = [Math.floor(i / scaleDim), i % scaleDim];
        const number = k < kept ? (levels - 1 - j) * kept + k : dim; // the first numbers of the cell are in the last block
        const residual = number < dim ? unit[row * dim + number] : 0;
        full[row * width + j * scaleDim + k] = (blockScale[j] * anchor) / sums[row] + residualScale[j] * residual;
      });
    });
    return normalize(full, width);
  }
}
