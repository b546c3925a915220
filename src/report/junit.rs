//! JUnit XML, as continuous integration reads it.

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It failed, with the reason.
    Failed(String),
    /// It could not be run, with the reason.
    Error(String),
}

/// A test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Test {
    /// Its name within its suite.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Facts beside the outcome, by name; they become the test's output, for readers differ in where they take properties.
    pub properties: Vec<(String, String)>,
}

/// Tests of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suite {
    /// Its name.
    pub name: String,
    /// Its tests.
    pub tests: Vec<Test>,
}

/// A JUnit report; none where the writer fails.
pub fn junit(name: &str, suites: &[Suite]) -> Option<String> {
    let mut report = Report::new(name);
    for suite in suites {
        let mut out = TestSuite::new(suite.name.as_str());
        for test in &suite.tests {
            let status = match &test.outcome {
                Outcome::Passed => TestCaseStatus::success(),
                Outcome::Failed(reason) => failed(NonSuccessKind::Failure, reason),
                Outcome::Error(reason) => failed(NonSuccessKind::Error, reason),
            };
            let mut case = TestCase::new(test.name.as_str(), status);
            case.set_classname(suite.name.as_str());
            if !test.properties.is_empty() {
                let facts: Vec<String> =
                    test.properties.iter().map(|(name, value)| format!("{name}: {value}")).collect();
                case.set_system_out(facts.join("\n"));
            }
            out.add_test_case(case);
        }
        report.add_test_suite(out);
    }
    let xml = report.to_string().ok()?;
    // schemas in use know `skipped` on a suite, but not on all of them together
    let (head, rest) = xml.split_at(xml.find("<testsuite ").unwrap_or(xml.len()));
    Some(head.replace(" skipped=\"0\"", "") + rest)
}

fn failed(kind: NonSuccessKind, reason: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(reason);
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_counted_and_text_is_escaped() {
        let test =
            |name: &str, outcome| Test { name: name.into(), outcome, properties: vec![("kl".into(), "1e-9".into())] };
        let tests = vec![
            test("a", Outcome::Passed),
            test("b", Outcome::Failed("1 < 2 & \u{1}".into())),
            test("c", Outcome::Error("no library".into())),
        ];
        let xml = junit("prefold verify", &[Suite { name: "onnxruntime".into(), tests }]).unwrap();
        assert!(xml.contains("tests=\"3\"") && xml.contains("failures=\"1\"") && xml.contains("errors=\"1\""), "{xml}");
        assert!(xml.contains("message=\"1 &lt; 2 &amp; ") && xml.contains("classname=\"onnxruntime\""), "{xml}");
        assert!(xml.contains("<system-out>kl: 1e-9</system-out>"), "{xml}");
        let head = xml.split("<testsuite ").next().unwrap();
        assert!(!head.contains("skipped") && !xml.contains("<properties>"), "{xml}");
    }
}
