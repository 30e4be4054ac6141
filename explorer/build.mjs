// src/ -> data/explorer.html: one file, in which only the data of a page are missing (fractal/explorer.py adds them).
// The page may run this one script and nothing else, and ask no machine for anything: its Content-Security-Policy says so.
import { createHash } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { build } from "esbuild";

const here = (path) => new URL(path, import.meta.url).pathname;
const options = { bundle: true, minify: true, write: false, target: "es2022", legalComments: "inline", logLevel: "warning" };
const script = await build({ ...options, entryPoints: [here("src/main.ts")], format: "iife" });
const style = await build({ ...options, entryPoints: [here("src/style.css")] });

const code = script.outputFiles[0].text.replaceAll("</script", "<\\/script");
const css = style.outputFiles[0].text.trim();
const sha256 = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
const policy = [
  "default-src 'none'",
  `script-src ${sha256(code)}`,
  `style-src ${sha256(css)}`,
  "base-uri 'none'",
  "form-action 'none'",
].join("; ");
const template = await readFile(here("src/index.html"), "utf8");
const page = template
  .replace("{{policy}}", () => policy)
  .replace("{{style}}", () => css)
  .replace("{{script}}", () => code);
const target = process.argv[2] ?? here("../data/explorer.html");
await writeFile(target, page);
