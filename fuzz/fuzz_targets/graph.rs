//! The loader, the checks, the locator and an edit, on a file that may be anything.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use prefold::adapter::Query;
use prefold::fold::locate;
use prefold::onnx::{self, Index, Model, NodeDef, Patch};

fuzz_target!(|bytes: &[u8]| {
    let Ok(model) = Model::from_bytes(bytes.to_vec()) else { return };
    assert!(model.to_bytes() == bytes, "loading and saving changed the file");
    let _listing = model.graph().to_string();
    let nowhere = Path::new("/nonexistent");
    let _files = (onnx::external_files(&model), onnx::data_files(&model, nowhere));
    let _checks = (onnx::check(&model), onnx::check_any_order(&model), onnx::check_types(&model));
    for tensor in model.graph().initializers() {
        let _values = (tensor.to_f32s(), tensor.to_i64s(), tensor.data_in(nowhere));
    }
    for site in locate::sites(&model).into_iter().flatten() {
        for wanted in [Query::PostRope, Query::PreRope] {
            let _query = locate::query(&model, &site, wanted);
        }
    }
    edit(&model);
});

/// Doubles what the last node reads, and takes what comes out for a file again.
fn edit(model: &Model) {
    let index = Index::new(model.graph());
    let Some(node) = model.graph().nodes().last() else { return };
    let Some(tensor) = node.input(0) else { return };
    assert!(index.consumers(tensor).iter().any(|used| used.node == node.id()));
    let mut patch = Patch::new("edit");
    patch
        .insert_before(node.id(), NodeDef::new("Add", "fuzz/add").inputs([tensor, tensor]).outputs(["fuzz/sum"]))
        .replace_input(node.id(), 0, "fuzz/sum")
        .set_metadata("fuzz", "edited");
    let Ok(edited) = patch.apply(model) else { return };
    let saved = edited.to_bytes();
    let again = Model::from_bytes(saved.clone()).expect("an edited model is a model");
    assert!(again.to_bytes() == saved && again.graph().to_string() == edited.graph().to_string());
}
