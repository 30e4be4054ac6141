// src/ -> data/explorer.html: one file, in which only the data of a page are missing (fractal/explorer.py adds them).
// The page may run this one script and nothing else, and ask no machine for anything: its Content-Security-Policy says so.
import { createHash } from "node:crypto";
import { readdir, readFile, writeFile } from "node:fs/promises";
import { build } from "esbuild";

const here = (path) => new URL(path, import.meta.url).pathname;
const options = { bundle: true, jsx: "automatic", jsxImportSource: "preact", minify: true, write: false, target: "es2022", legalComments: "none", logLevel: "warning" };
const script = await build({ ...options, entryPoints: [here("src/main.tsx")], format: "iife", metafile: true });
const style = await build({ ...options, entryPoints: [here("src/style.css")] });

const code = script.outputFiles[0].text.replaceAll("</script", "<\\/script");
const css = style.outputFiles[0].text.trim();
const sha256 = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
const policy = [
  "default-src 'none'",
  `script-src ${sha256(code)}`,
  `style-src ${sha256(css)}`,
  "worker-src blob:", // of the same script, see src/main.tsx
  "base-uri 'none'",
  "form-action 'none'",
].join("; ");
// The licences of what is bundled ask to be passed on with it.
const packages = new Set(Object.keys(script.metafile.inputs).map((path) => /node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(path)?.[1]));
packages.delete(undefined);
const licences = await Promise.all(
  [...packages].sort().map(async (name) => {
    const folder = here(`node_modules/${name}/`);
    const { version, license } = JSON.parse(await readFile(`${folder}package.json`, "utf8"));
    const file = (await readdir(folder)).find((entry) => /^licen[cs]e/i.test(entry));
    return `${name} ${version} (${license})\n\n${file ? await readFile(folder + file, "utf8") : ""}`;
  }),
);
const template = await readFile(here("src/index.html"), "utf8");
const page = template
  .replace("{{policy}}", () => policy)
  .replace("{{style}}", () => css)
  .replace("{{script}}", () => code)
  .replace("{{licences}}", () => licences.join("\n").replaceAll("<", "\\u003c"));
const target = process.argv[2] ?? here("../data/explorer.html");
await writeFile(target, page);
