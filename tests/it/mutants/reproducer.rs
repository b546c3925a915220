//! A reproducer as `onnx` and ONNX Runtime read it.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::graph::{insert, node, op};
use super::{Bench, CASES, Dialect, Kind, dialects};
use prefold::onnx::{Model, TensorDef};

/// Loads the tests of a folder as onnx's backend tests are loaded; the largest distance of what comes out from what should come.
const SCRIPT: &str = r"
import json, sys
import numpy as np, onnx
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator

[case] = load_model_tests(sys.argv[1], sys.argv[2])
path = case.model_dir + '/model.onnx'
onnx.checker.check_model(path, full_check=True)
model = onnx.load(path)

def tensors(kind, ports):
    for number, port in enumerate(ports):
        tensor = onnx.load_tensor(f'{case.model_dir}/test_data_set_0/{kind}_{number}.pb')
        assert tensor.name == port.name, (tensor.name, port.name)
        yield port.name, onnx.numpy_helper.to_array(tensor)

feeds = dict(tensors('input', model.graph.input))
wanted = [array for _, array in tensors('output', model.graph.output)]
distance = lambda found: max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
found = {'onnx': distance(ReferenceEvaluator(model).run(None, feeds))}
try:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    found['onnxruntime'] = distance(session.run(None, feeds))
except ImportError:
    pass
print(json.dumps(found))
";

fn slightly_more(model: &Model, _: Dialect) -> Model {
    let name = "/prefold.1/layers.1/MatMul";
    let more = TensorDef::from_f32s("mutant/more", &[], &[1.01]);
    let input = node(model, name).input(0).unwrap();
    insert(model, name, 0, vec![more], vec![op("Mul", "mutant/moved", &[input, "mutant/more"])], "mutant/moved")
}

/// The nodes at fault compute there what they compute in the whole graph: as far from what they should as the report says.
#[test]
fn a_reproducer_fails_in_other_runtimes_by_the_distance_of_the_report() {
    let has_onnx = Command::new("python3").args(["-c", "import onnx"]).output();
    if !has_onnx.is_ok_and(|output| output.status.success()) {
        println!("skipped: no python3 with the `onnx` package");
        return;
    }
    for dialect in dialects() {
        let bench = Bench::new(dialect);
        let (code, report, text) = bench.verify(0, (Kind::Folded, CASES), slightly_more);
        assert_eq!(code, 1, "{text}");
        let departure = &report["runs"][0]["departure"];
        assert_eq!((&departure["layer"], &departure["place"]), (&1.into(), &"term".into()), "{departure:#}");
        let folder = Path::new(departure["reproducer"].as_str().unwrap());
        let kind = folder.parent().unwrap().to_str().unwrap();
        let output = Command::new("python3")
            .args(["-c", SCRIPT])
            .arg(bench.folder.path())
            .arg(kind)
            .current_dir(bench.folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let told = departure["distance"].as_f64().unwrap();
        for (runtime, distance) in found.as_object().unwrap() {
            let distance = distance.as_f64().unwrap();
            assert!((distance - told).abs() < 1e-3 * told, "{runtime}: {distance}, the report says {told}");
        }
    }
}
