// A dropped file -> vectors. CSV and TSV, Parquet, .npy. What does not fit is said in one line.

import { gunzipSync } from "fflate";
import { decompress } from "fzstd";
import { parquetMetadataAsync, parquetReadObjects, parquetSchema } from "hyparquet";
import Papa from "papaparse";

export interface Dropped {
  vectors: Float32Array; // (n, dim)
  n: number;
  names: string[] | null;
}

const NAMES = ["cell_id", "obs_names", "index", "__index_level_0__"]; // as fractal/vectors.py

export async function readVectors(file: File, dim: number): Promise<Dropped> {
  const kind = file.name.toLowerCase().split(".").pop();
  if (file.size === 0) throw new Error(`${file.name} is empty`);
  const bytes = await file.arrayBuffer();
  let read: Dropped;
  if (kind === "npy") read = readNpy(bytes, dim);
  else if (kind === "parquet" || kind === "pq") read = await readParquet(bytes, dim);
  else if (kind === "csv" || kind === "tsv" || kind === "txt") read = readText(new TextDecoder().decode(bytes), dim);
  else throw new Error(`${file.name}: CSV, TSV, Parquet and .npy are read`);
  if (read.n === 0) throw new Error(`${file.name} holds no cell`);
  return read;
}

function expected(found: number, dim: number): Error {
  return new Error(`it has ${found} numbers a cell, the reference takes ${dim}: vectors of the same embedding`);
}

/** A header is what can't be read as numbers; a column that is no number names the cells. */
function readText(text: string, dim: number): Dropped {
  const { data } = Papa.parse<string[]>(text.replace(/^\uFEFF/, ""), { skipEmptyLines: "greedy" });
  const isNumber = (value: string) => /^\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)|)\s*$/i.test(value);
  if (!data.length) return { vectors: new Float32Array(), n: 0, names: null };
  const sample = data[Math.min(1, data.length - 1)];
  let columns = sample.map((_, k) => k).filter((k) => isNumber(sample[k]));
  // A first column of row numbers, as pandas writes its index, is no part of the vector.
  const indexed = columns[0] === 0 && (!data[0][0].trim() || NAMES.includes(data[0][0]));
  if (indexed) columns = columns.slice(1);
  const top = columns.map((k) => data[0][k]);
  const counted = top.length > 1 && top.every((value, k) => Number(value) === Number(top[0]) + k); // columns 0, 1, 2, ...
  const header = indexed || counted || top.some((value) => !isNumber(value));
  if (columns.length !== dim) throw expected(columns.length, dim);
  const first = header ? 1 : 0;
  const n = data.length - first;
  const vectors = new Float32Array(n * dim);
  const named = indexed ? 0 : sample.findIndex((value) => !isNumber(value));
  for (let i = 0; i < n; i++) {
    const row = data[i + first];
    if (row.length !== sample.length) throw new Error(`line ${i + first + 1} has ${row.length} fields, not ${sample.length}`);
    columns.forEach((column, k) => {
      const value = row[column].trim();
      vectors[i * dim + k] = value === "" ? NaN : /inf/i.test(value) ? Infinity : Number(value);
    });
  }
  return { vectors, n, names: named < 0 ? null : data.slice(first).map((row) => row[named]) };
}

/** Format version 1 to 3; floats of 2, 4 or 8 bytes, rows or columns first. */
function readNpy(buffer: ArrayBuffer, dim: number): Dropped {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  if (bytes.length < 12 || bytes[0] !== 0x93 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") {
    throw new Error("it is no .npy file");
  }
  const [length, start] = bytes[6] === 1 ? [view.getUint16(8, true), 10] : [view.getUint32(8, true), 12];
  const header = new TextDecoder().decode(bytes.subarray(start, start + length));
  const type = /'descr':\s*'([<>|=])f([248])'/.exec(header);
  const shape = /'shape':\s*\((\d+),\s*(\d+),?\s*\)/.exec(header);
  if (!type || !shape) throw new Error("it must hold floats, cells x numbers");
  const [n, found] = [Number(shape[1]), Number(shape[2])];
  if (found !== dim) throw expected(found, dim);
  const size = Number(type[2]);
  if (bytes.length < start + length + n * dim * size) throw new Error("it is cut short");
  const little = type[1] !== ">";
  const get = {
    2: (at: number) => float16(view.getUint16(at, little)),
    4: (at: number) => view.getFloat32(at, little),
    8: (at: number) => view.getFloat64(at, little),
  }[size as 2 | 4 | 8];
  const columnsFirst = /'fortran_order':\s*True/.test(header);
  const vectors = new Float32Array(n * dim);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < dim; k++) {
      vectors[i * dim + k] = get(start + length + size * (columnsFirst ? k * n + i : i * dim + k));
    }
  }
  return { vectors, n, names: null };
}

function float16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
}

/** A column `embedding` of lists, or `dim` columns of numbers; a column of names as pandas and we call it. */
async function readParquet(buffer: ArrayBuffer, dim: number): Promise<Dropped> {
  const compressors = {
    ZSTD: (input: Uint8Array) => decompress(input),
    GZIP: (input: Uint8Array) => gunzipSync(input),
  };
  const metadata = await parquetMetadataAsync(buffer);
  const fields = parquetSchema(metadata).children;
  const there = fields.map((field) => field.element.name);
  const isFloat = (type: string | undefined) => type === "FLOAT" || type === "DOUBLE";
  const numbers = fields.filter((field) => isFloat(field.element.type)).map((field) => field.element.name);
  const lists = there.includes("embedding");
  if (!lists && numbers.length !== dim) {
    throw new Error(`it has no column 'embedding', and ${numbers.length} columns of floats, not ${dim}`);
  }
  const named = NAMES.find((name) => there.includes(name));
  const wanted = lists ? ["embedding"] : numbers;
  const columns = named && !wanted.includes(named) ? [...wanted, named] : wanted;
  const rows = await parquetReadObjects({ file: buffer, metadata, columns, compressors });
  const vectors = new Float32Array(rows.length * dim);
  rows.forEach((row, i) => {
    const values: ArrayLike<number> = lists ? (row.embedding ?? []) : numbers.map((name) => row[name] as number);
    if (values.length !== dim) throw expected(values.length, dim);
    vectors.set(values, i * dim);
  });
  return { vectors, n: rows.length, names: named ? rows.map((row) => String(row[named])) : null };
}
