"""Checks SARIF reports against the official schema of SARIF 2.1.0, which some packages ship (npm: @microsoft/jest-sarif,
lib/schemas/sarif-2.1.0-rtm.5.json). Without it, or without the package jsonschema, nothing is checked, and that is said.

    check-reports.py SCHEMA REPORT.sarif ...
"""

import json
import pathlib
import sys

schema, reports = pathlib.Path(sys.argv[1]), sys.argv[2:]
try:
    import jsonschema
except ImportError:
    sys.exit(print("skipped: the package jsonschema is not here"))
if not schema.is_file():
    sys.exit(print(f"skipped: {schema} is not here"))
schema = json.loads(schema.read_text())
validator = jsonschema.validators.validator_for(schema)(schema)
errors = 0
for report in reports:
    for error in validator.iter_errors(json.loads(pathlib.Path(report).read_text())):
        print(f"{report}: {error.json_path}: {error.message}")
        errors += 1
print(f"{len(reports)} reports, {errors} errors")
sys.exit(errors > 0)
