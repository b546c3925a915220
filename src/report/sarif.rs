//! SARIF 2.1.0, as code-scanning services read it.

use serde_json::{Value, json};

use crate::files;

/// A rule that results refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its stable identifier.
    pub id: &'static str,
    /// What it asks for.
    pub description: &'static str,
}

/// A result: something that a rule found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The rule's identifier.
    pub rule: &'static str,
    /// Whether it is an error; a warning otherwise.
    pub error: bool,
    /// What was found.
    pub message: String,
    /// Where: a name within the file.
    pub place: String,
}

/// A SARIF log of one run over one file, whose path is relative to the repository's root.
pub fn sarif(version: &str, rules: &[Rule], file: &str, findings: &[Finding]) -> Value {
    let rule = |rule: &Rule| json!({ "id": rule.id, "shortDescription": { "text": rule.description } });
    let result = |finding: &Finding| {
        json!({
            "ruleId": finding.rule,
            "ruleIndex": rules.iter().position(|rule| rule.id == finding.rule),
            "level": if finding.error { "error" } else { "warning" },
            "message": { "text": finding.message },
            "locations": [{
                // GitHub asks for a line of every result
                "physicalLocation": { "artifactLocation": { "uri": uri(file) }, "region": { "startLine": 1 } },
                "logicalLocations": [{ "fullyQualifiedName": finding.place }],
            }],
            // and takes results of one rule and line for one alert unless these differ
            "partialFingerprints": { "primaryLocationLineHash": files::sha256_bytes(finding.place.as_bytes()) },
        })
    };
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "prefold",
                "semanticVersion": version,
                "rules": rules.iter().map(rule).collect::<Vec<_>>(),
            } },
            // a log of another file is another one beside it, and not its next version
            "automationDetails": { "id": format!("prefold/{}/", uri(file)) },
            "columnKind": "unicodeCodePoints",
            "results": findings.iter().map(result).collect::<Vec<_>>(),
        }],
    })
}

/// A path as a URI reference.
fn uri(path: &str) -> String {
    let mut out = String::new();
    for byte in path.replace('\\', "/").bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_refer_to_their_rules_and_files_are_uris() {
        let rules = [Rule { id: "a", description: "first" }, Rule { id: "b", description: "second" }];
        let finding = Finding { rule: "b", error: true, message: "far".into(), place: "tract/one_token".into() };
        let other = Finding { place: "tract/single_row".into(), ..finding.clone() };
        let log = sarif("1.2.3", &rules, "out dir/model.onnx", &[finding, other]);
        let result = &log["runs"][0]["results"][0];
        assert_eq!((&result["ruleIndex"], &result["level"]), (&json!(1), &json!("error")));
        let location = &result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"];
        assert_eq!(location, "out%20dir/model.onnx");
        assert_eq!(result["locations"][0]["physicalLocation"]["region"]["startLine"], 1);
        assert_ne!(result["partialFingerprints"], log["runs"][0]["results"][1]["partialFingerprints"]);
        assert_eq!(log["version"], "2.1.0");
    }
}
