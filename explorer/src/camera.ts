// Which part of the map is on the screen: pan and zoom by d3-zoom.

import { select } from "d3-selection";
import "d3-transition";
import { zoom, zoomIdentity, type ZoomTransform } from "d3-zoom";

export type Point = [number, number];

const FIT = 0.88; // share of the free space that the whole map takes
const LIMITS: [number, number] = [0.5, 60]; // of the zoom; at 1 the whole map is seen
const MOVE = 300; // milliseconds of a flight

export const isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export class Camera {
  width = 1; // pixels of the screen
  height = 1;
  private transform: ZoomTransform = zoomIdentity;
  private readonly zooming = zoom<HTMLCanvasElement, unknown>();

  /** isFree: whether the event may move the camera; moved: called on each step, and at rest. */
  constructor(
    private readonly canvas: HTMLCanvasElement, isFree: (event: MouseEvent) => boolean, moved: (isAtRest: boolean) => void,
  ) {
    this.zooming
      .scaleExtent(LIMITS)
      .filter((event: MouseEvent) => isFree(event) && (!event.ctrlKey || event.type === "wheel") && !event.button)
      .on("zoom", ({ transform }: { transform: ZoomTransform }) => {
        this.transform = transform;
        moved(false);
      })
      .on("end", () => moved(true));
    select(canvas).call(this.zooming);
  }

  get zoom(): number {
    return this.transform.k;
  }

  /** Pixels per unit of the map, which reaches from -1 to 1. */
  get scale(): number {
    return this.fit * this.zoom;
  }

  private get fit(): number {
    return (Math.min(this.width, this.height) / 2) * FIT;
  }

  toScreen([x, y]: Point): Point {
    return this.transform.apply([this.width / 2 + this.fit * x, this.height / 2 - this.fit * y]);
  }

  toMap(x: number, y: number): Point {
    const [left, top] = this.transform.invert([x, y]);
    return [(left - this.width / 2) / this.fit, (this.height / 2 - top) / this.fit];
  }

  /** Zoom, and the point of the map in the middle of the screen. */
  get view(): [number, number, number] {
    return [this.zoom, ...this.toMap(this.width / 2, this.height / 2)];
  }

  look([k, x, y]: [number, number, number], smooth = false): void {
    const { width, height, fit, zooming } = this;
    const zoom = Math.min(LIMITS[1], Math.max(LIMITS[0], k));
    const middle = zoomIdentity.translate(width / 2, height / 2).scale(zoom);
    const next = middle.translate(-(width / 2 + fit * x), -(height / 2 - fit * y));
    const canvas = select(this.canvas).interrupt();
    if (smooth && !isStill()) canvas.transition().duration(MOVE).call(zooming.transform, next);
    else canvas.call(zooming.transform, next);
  }

  zoomBy(factor: number): void {
    const [zoom, x, y] = this.view;
    this.look([zoom * factor, x, y], true);
  }
}
