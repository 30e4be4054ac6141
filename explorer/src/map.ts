// The map: cells at a prefix, the lasso, and over the cells names, lines and rings.

import { quantile } from "d3-array";
import { easeCubicInOut } from "d3-ease";
import { interpolateNumber } from "d3-interpolate";
import { polygonContains } from "d3-polygon";
import { select } from "d3-selection";
import { Camera, isStill, type Point } from "./camera";
import { type Box, drawLine, drawNames, drawRing, RING } from "./overlay";
import type { Page } from "./page";
import { Points } from "./points";
import { spread } from "./spread";

export type Hit = { layer: number; row: number }; // layer 0: the cells of the page; 1: those that were dropped

interface Layer {
  layouts: Float32Array[]; // (n, 2) per prefix
  positions: Float32Array; // (n, 2) at the prefix of the map
}

const CORNERS = 150; // of a lasso, at most
const MORPH = 800; // milliseconds between two prefixes

export class MapView {
  isDrawing = false; // a pointer that moves draws a lasso
  lasso: number[] | null = null; // corners on the map, x and y in turn
  lassoAt = 1; // the prefix at which it was drawn: at another one the cells lie elsewhere
  nameBoxes: Box[] = []; // of the names on the screen
  readonly camera: Camera;
  readonly ratio = Math.min(devicePixelRatio, 2); // pixels of a canvas per pixel of the screen
  private readonly points: Points;
  private readonly layers: Layer[] = [];
  private planned = 0;
  private current = 1;

  constructor(private readonly canvas: HTMLCanvasElement, private readonly overlay: HTMLCanvasElement, private readonly page: Page) {
    this.points = new Points(canvas);
    const isLasso = (event: MouseEvent) => this.isDrawing || event.shiftKey;
    this.camera = new Camera(canvas, (event) => !isLasso(event), (isAtRest) => (isAtRest ? page.remember() : this.draw()));
    const hit = ({ offsetX, offsetY }: MouseEvent) => this.pick(offsetX, offsetY);
    canvas.addEventListener("click", (event) => isLasso(event) || page.choose(hit(event)));
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons || event.pointerType === "touch") return;
      const { offsetLeft, offsetTop } = canvas.parentElement!; // of the view
      page.pointAt(hit(event), event.offsetX + offsetLeft, event.offsetY + offsetTop + canvas.offsetTop);
    });
    canvas.addEventListener("pointerleave", () => page.pointAt(null));
    canvas.addEventListener("pointerdown", (event) => isLasso(event) && event.button === 0 && this.drawLasso(event));
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // --- cells and prefix --------------------------------------------------------------------------------------------

  /** Put cells above those that were added before: layouts (n, 2) per prefix, colours (n, 4). */
  add(layouts: Float32Array[], colours: Uint8Array): void {
    const cells = (this.layers[0]?.layouts ?? layouts)[0].length / 2;
    const side = Math.min(0.018, Math.max(0.0065, 1.74 / Math.sqrt(cells))); // of a disc, see `size`
    const apart = layouts.map((layout) => spread(layout, side));
    const positions = blend(apart, this.prefix);
    this.layers.push({ layouts: apart, positions });
    this.points.add(positions, colours);
    this.draw();
  }

  removeFrom(layer: number): void {
    this.points.removeFrom(layer);
    this.layers.splice(layer);
    this.draw();
  }

  setColours(layer: number, colours: Uint8Array): void {
    this.points.update(layer, "colour", colours);
    this.draw();
  }

  /** 1 to the number of prefixes, and between. */
  get prefix(): number {
    return this.current;
  }

  set prefix(prefix: number) {
    this.current = prefix;
    this.layers.forEach((layer, i) => {
      layer.positions = blend(layer.layouts, prefix);
      this.points.update(i, "position", layer.positions);
    });
    this.draw();
  }

  /** Move to a prefix, at once or in MORPH milliseconds; `step` is called at each prefix on the way. */
  morph(to: number, smooth: boolean, step: () => void): void {
    const between = interpolateNumber(this.prefix, to);
    const at = (share: number) => {
      this.prefix = share === 1 ? to : between(share);
      step();
    };
    const canvas = select(this.canvas).interrupt("prefix");
    if (!smooth || isStill()) return at(1);
    canvas.transition("prefix").duration(MORPH).ease(easeCubicInOut).tween("prefix", () => at).on("end", () => this.page.remember());
  }

  position({ layer, row }: Hit): Point {
    const { positions } = this.layers[layer];
    return [positions[2 * row], positions[2 * row + 1]];
  }

  /** Rows of a layer inside the corners, x and y in turn. */
  inside(layer: number, corners: number[]): number[] {
    const polygon = pairs(corners);
    const rows = [...Array(this.layers[layer].positions.length / 2).keys()];
    return rows.filter((row) => polygonContains(polygon, this.position({ layer, row })));
  }

  /** The nearest lit cell within reach of a pixel; cells of later layers, which lie above, come first. */
  private pick(x: number, y: number): Hit | null {
    const [mapX, mapY] = this.camera.toMap(x, y);
    for (let layer = this.layers.length - 1; layer >= 0; layer--) {
      const { positions } = this.layers[layer];
      let nearest: Hit | null = null;
      let least = ((this.size() / 2 + (layer ? 5 : 3)) / this.camera.scale) ** 2;
      for (let row = 0; row < positions.length / 2; row++) {
        const square = (positions[2 * row] - mapX) ** 2 + (positions[2 * row + 1] - mapY) ** 2;
        if (square < least && this.page.isLit({ layer, row })) [nearest, least] = [{ layer, row }, square];
      }
      if (nearest) return nearest;
    }
    return null;
  }

  /** Look at most of these cells. */
  frame(layer: number, rows: number[]): void {
    const ends = (axis: number) => [0.05, 0.95].map((q) => quantile(rows, q, (row) => this.position({ layer, row })[axis])!);
    const [[left, right], [low, high]] = [ends(0), ends(1)];
    if (left === undefined) return; // none has a position
    const zoom = Math.min(8, 1.1 / Math.max(right - left, high - low, 0.05));
    this.camera.look(zoom <= 1.2 ? [1, 0, 0] : [zoom, (left + right) / 2, (low + high) / 2], true);
  }

  // --- drawing -----------------------------------------------------------------------------------------------------

  draw(): void {
    this.planned ||= requestAnimationFrame(() => this.drawNow());
  }

  drawNow(): void {
    cancelAnimationFrame(this.planned);
    this.planned = 0;
    if (!this.canvas.clientWidth) return; // it is hidden
    const sizes = this.layers.map((_, layer) => (layer ? 1.5 * this.size() + 3 : this.size()));
    this.points.draw(this.camera.toScreen([0, 0]), this.camera.scale, sizes, this.ratio);
    this.drawOverlay();
  }

  /** Pixels across a cell: less where there are more, and more where one looks closer. */
  private size(): number {
    const { width, height, zoom } = this.camera;
    const cells = Math.max(1, (this.layers[0]?.positions.length ?? 0) / 2);
    const whole = (0.8 * Math.min(width, height)) / Math.sqrt(cells);
    return Math.min(16, Math.min(6, Math.max(2.2, whole)) * zoom ** 0.45);
  }

  /** Fit the canvases to their elements; what is in the middle stays there. */
  resize(): void {
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth || !clientHeight) return;
    const { view } = this.camera;
    [this.camera.width, this.camera.height] = [clientWidth, clientHeight];
    this.camera.look(view);
    for (const canvas of [this.canvas, this.overlay]) {
      [canvas.width, canvas.height] = [clientWidth, clientHeight].map((size) => Math.round(size * this.ratio));
    }
    this.drawNow();
  }

  private drawOverlay(): void {
    const { camera, page, prefix, ratio } = this;
    const context = this.overlay.getContext("2d")!;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.overlay.width, this.overlay.height);
    const { color: ink, backgroundColor: ground, accentColor: accent } = getComputedStyle(document.body);
    const at = (hit: Hit) => camera.toScreen(this.position(hit));
    const nearest = Math.round(prefix);
    const opacity = 1 - 5 * Math.abs(prefix - nearest);
    context.globalAlpha = Math.max(0, opacity);
    const islands = opacity > 0 ? page.islands(nearest) : []; // none between two prefixes
    const positions = this.layers.map((layer) => layer.positions);
    this.nameBoxes = drawNames(context, camera, islands, positions, page.cell && at(page.cell), ink, ground);
    context.globalAlpha = 1;
    if (page.cell) {
      for (const row of page.cellNeighbours?.raw.rows ?? []) link(at({ layer: 0, row }), 2.5, "#888888", 0.8, [3, 3]);
      for (const row of page.cellNeighbours?.fractal.rows ?? []) link(at({ layer: 0, row }), 3, accent, 1.2, []);
      drawRing(context, at(page.cell), RING, ground, 5);
      drawRing(context, at(page.cell), RING, ink, 2.5);
    }
    if (this.lasso && Math.abs(prefix - this.lassoAt) < 0.01) {
      const corners = pairs(this.lasso).map((corner) => camera.toScreen(corner));
      drawLine(context, [...corners, corners[0]], ink, 1.5, [5, 4]);
    }

    /** A line from the chosen cell to another one, with a ring there. */
    function link(to: Point, radius: number, colour: string, width: number, dashes: number[]): void {
      drawLine(context, [at(page.cell!), to], colour, width, dashes);
      drawRing(context, to, radius, colour, width);
    }
  }

  // --- lasso -------------------------------------------------------------------------------------------------------

  setLasso(corners: number[] | null): void {
    this.lasso = corners;
    this.lassoAt = Number(this.prefix.toFixed(2));
    this.draw();
  }

  private drawLasso(start: PointerEvent): void {
    start.preventDefault();
    this.canvas.setPointerCapture(start.pointerId);
    const corners: number[] = [];
    let last: Point = [-Infinity, -Infinity];
    const move = ({ offsetX, offsetY }: PointerEvent) => {
      if (Math.hypot(offsetX - last[0], offsetY - last[1]) < 4) return;
      last = [offsetX, offsetY];
      corners.push(...this.camera.toMap(...last).map((value) => Math.round(1000 * value) / 1000));
      this.draw();
    };
    const end = () => {
      this.canvas.removeEventListener("pointermove", move);
      const step = Math.ceil(corners.length / 2 / CORNERS);
      const kept = corners.filter((_, i) => (i >> 1) % step === 0);
      this.page.select(kept.length >= 6 ? kept : null, this);
    };
    move(start);
    this.setLasso(corners);
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerup", end, { once: true });
  }
}

const pairs = (corners: number[]) =>
  Array.from({ length: corners.length / 2 }, (_, i): Point => [corners[2 * i], corners[2 * i + 1]]);

/** Positions (n, 2) at a prefix between two layouts. */
function blend(layouts: Float32Array[], prefix: number): Float32Array {
  const from = layouts[Math.floor(prefix) - 1];
  const to = layouts[Math.floor(prefix)] ?? from;
  const share = prefix % 1;
  const positions = new Float32Array(from.length);
  for (let i = 0; i < from.length; i++) positions[i] = from[i] + (to[i] - from[i]) * share;
  return positions;
}
