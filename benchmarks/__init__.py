"""How fast tokvm is, in ratios that one run can state: `python -m benchmarks --help`. Not part of the package."""
