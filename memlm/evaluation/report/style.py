"""The frame of the page. Nothing is loaded from elsewhere."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1c1e21; --back: #ffffff; --line: #d5d8dc; --soft: #f3f4f6; --dim: #5c636b;
  --accent: #005a94; --mark: #ffe08a; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e8e6e3; --back: #16181c; --line: #3a3e45; --soft: #22252b; --dim: #a3a9b2;
    --accent: #7cc0f0; --mark: #6b5200; }}
}}
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.5rem; margin: 0.5rem 0; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.8rem;
  border-top: 1px solid var(--line); }}
h3 {{ font-size: 1.05rem; margin: 1.5rem 0 0.3rem; }}
h4 {{ font-size: 1rem; margin: 1rem 0 0.3rem; }}
p, li {{ max-width: 46rem; }}
a {{ color: var(--accent); }}
nav {{ display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; margin: 0.7rem 0; }}
.dim {{ color: var(--dim); }}
.wide {{ overflow-x: auto; margin: 0.6rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }}
th[scope="row"], .text {{ text-align: left; font-weight: normal; }}
th[scope="row"] {{ vertical-align: top; }}
th[scope="col"] {{ font-weight: 600; vertical-align: bottom; white-space: normal; }}
td.free {{ white-space: normal; overflow-wrap: anywhere; min-width: 8rem; text-align: left; }}
tr.start > * {{ border-top: 2px solid var(--line); }}
small {{ color: var(--dim); }}
img {{ width: 100%; height: auto; display: block; }}
pre {{ background: var(--soft); padding: 0.7rem; border-radius: 4px; font-size: 0.85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; }}
code {{ background: var(--soft); padding: 0 0.2rem; border-radius: 3px; overflow-wrap: anywhere; }}
mark {{ background: var(--mark); color: inherit; padding: 0 0.1rem; }}
details {{ margin: 0.7rem 0; }}
summary {{ cursor: pointer; color: var(--accent); }}
details[open] {{ border-left: 2px solid var(--line); padding-left: 0.7rem; }}
.row {{ display: flex; flex-wrap: wrap; gap: 0 2.5rem; }}
.row > div {{ max-width: 100%; }}
@media (max-width: 40rem) {{
  body {{ padding: 0.7rem; }}
  th, td {{ padding: 0.25rem 0.4rem; }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""
