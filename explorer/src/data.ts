// What fractal/explorer.py put into the page: facts as JSON, arrays as base64 of gzip of their byte planes.

export interface TreeNode {
  name: string;
  parent: number; // row in `nodes`; -1: the root, which is row 0
  colour: string;
  id: string; // of the Cell Ontology, "" for none
  synonyms: string[];
}

export interface Column {
  name: string;
  values?: string[]; // codes are 1 + the place in it, 0 is missing
  low?: number; // of numbers: the 1st and the 99th percentile
  high?: number;
}

export type Knots = [number[], number[]];

export interface About {
  title: string;
  reference: string;
  cells: number;
  total: number; // cells of the file
  levels: string[];
  blocks: string[]; // the level that each block stands for
  widths: number[]; // numbers of each prefix
  nodes: TreeNode[]; // each before what is below it
  unknown: string; // colour of cells without a label
  known: boolean; // labels are the file's own, not the reference's answers
  columns: Column[];
  names: string[] | null; // of the cells
  adapter: {
    levels: number;
    scaleDim: number;
    classes: number[];
    tau: number;
    meansShare: number;
    meansTemperature: number;
    familiar: number;
    blockScale: number[];
    residualScale: number[];
    sharpness: number[];
  };
  annotator: {
    neighbours: number;
    temperature: number;
    novel: number;
    caution: number;
    cautiousDepth: number;
    confidence: number;
    votes: Knots[];
    paths: number[][]; // nodes of each path, coarse to fine
    cells: number; // of the whole reference
    heldOut: number;
  };
  facts: Record<string, string>;
}

const TYPES = {
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  int8: Int8Array,
  int16: Int16Array,
  float32: Float32Array,
  float64: Float64Array,
};
type TypeName = keyof typeof TYPES;
export type Numbers = Uint8Array | Uint16Array | Uint32Array | Int8Array | Int16Array | Float32Array | Float64Array;

export interface Matrix<T extends Numbers = Numbers> {
  values: T;
  shape: number[];
}

function need(id: string): HTMLElement {
  const element = document.getElementById(id);
  if (!element) throw new Error(`the page lacks ${id}`);
  return element;
}

export function readAbout(): About {
  return JSON.parse(need("about").textContent ?? "") as About;
}

function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function gunzip(bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>> {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The array called so. Its text is dropped: it is only read once. */
export async function readArray<T extends Numbers>(name: string): Promise<Matrix<T>> {
  const element = need(`array-${name}`);
  const type = TYPES[element.dataset.type as TypeName];
  const shape = (element.dataset.shape ?? "").split(",").map(Number);
  const planes = await gunzip(fromBase64(element.textContent ?? ""));
  element.remove();
  const size = type.BYTES_PER_ELEMENT;
  const count = planes.length / size;
  const bytes = new Uint8Array(planes.length);
  for (let k = 0; k < size; k++) {
    for (let i = 0, from = k * count, to = k; i < count; i++, from++, to += size) bytes[to] = planes[from];
  }
  return { values: new type(bytes.buffer) as Numbers as T, shape };
}

/** Whole numbers (n, dim) -> float32 rows of length 1, as fractal/explorer.py's `unit`. */
export function unitRows(whole: Matrix<Int16Array>): Float32Array {
  const [n, dim] = whole.shape;
  const rows = new Float32Array(n * dim);
  for (let i = 0; i < n; i++) {
    let square = 0;
    for (let k = i * dim; k < (i + 1) * dim; k++) square += whole.values[k] * whole.values[k];
    const norm = Math.sqrt(square) || 1;
    for (let k = i * dim; k < (i + 1) * dim; k++) rows[k] = whole.values[k] / norm;
  }
  return rows;
}
