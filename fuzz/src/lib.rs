//! What the fuzz targets run, on bytes that may be anything. A file of its own, so that `cargo test` runs it too, over the seeds
//! and mutations of them.

use std::path::Path;

use prefold::adapter::{Adapter, AdapterConfig, Lora, Method, Prefix, PrefixPlus, Query};
use prefold::files::Manifest;
use prefold::fold::{self, AdapterFile, Emission, FoldOptions, NamedAdapter, Over, Record, Site, locate};
use prefold::onnx::{self, Dim, Index, Model, NodeDef, Patch};

/// External data is never there.
const NOWHERE: &str = "/nonexistent";
/// Sites and widths of the largest graph that an adapter is folded into: those of the seeds, and some more.
const MAX_SITES: usize = 16;
const MAX_HEADS: usize = 64;
const MAX_WIDTH: usize = 128;

/// The loader, the checks, the locator and an edit.
pub fn graph(bytes: &[u8]) {
    let Ok(model) = Model::from_bytes(bytes.to_vec()) else { return };
    assert!(model.to_bytes() == bytes, "loading and saving changed the file");
    let _listing = model.graph().to_string();
    let nowhere = Path::new(NOWHERE);
    let _files = (onnx::external_files(&model), onnx::data_files(&model, nowhere));
    let _checks = (onnx::check(&model), onnx::check_any_order(&model), onnx::check_types(&model));
    for tensor in model.graph().initializers() {
        let _values = (tensor.to_f32s(), tensor.to_i64s(), tensor.data_in(nowhere));
    }
    let _blocks = locate::explain(&model);
    let _exactness = locate::exactness(&model);
    for site in locate::sites(&model).into_iter().flatten() {
        for wanted in [Query::PostRope, Query::PreRope] {
            let _query = locate::query(&model, &site, wanted);
        }
    }
    edit(&model);
}

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

/// An adapter of the graph's own shape into it, a second one over it, and both out again. Which method and which emission, the
/// length of the file says.
pub fn fold(bytes: &[u8]) {
    let Ok(model) = Model::from_bytes(bytes.to_vec()) else { return };
    let Ok(sites) = locate::sites(&model) else { return };
    let Some(config) = config(&model, &sites, bytes.len()) else { return };
    let Ok(adapter) = Adapter::zeros(config) else { return };
    let named = |name: &str| NamedAdapter { name: name.to_owned(), adapter: adapter.clone() };
    let emission = [Emission::Baked, Emission::Slot, Emission::Bank][bytes.len() / 8 % 3];
    let adapters = match emission {
        Emission::Baked => vec![named("one")],
        _ => vec![named("one"), named("two")],
    };
    let put = |model: &Model, over: Over| {
        let nowhere = Path::new(NOWHERE);
        fold::fold(model, nowhere, &adapters, FoldOptions { emission, over, ..FoldOptions::default() }, nowhere).ok()
    };
    let Some((folded, facts)) = put(&model, Over::Refuse) else { return };
    assert!(!facts.sites.is_empty());
    let saved = folded.to_bytes();
    let again = Model::from_bytes(saved).expect("a folded model is a model");
    for values in &facts.slot_values {
        fold::check_adapter_file(values, &again).expect("an adapter file of the fold fits it");
    }
    let base = fold::base(&again).expect("what was folded can be undone").expect("it was folded");
    assert!(base.to_bytes() == bytes, "the way back leads elsewhere");
    assert!(put(&again, Over::Refuse).is_none(), "a second fold is not asked for");
    if let Some((second, _)) = put(&again, Over::Stack) {
        let base = fold::base(&second).expect("a stack can be undone").expect("it was folded");
        assert!(base.to_bytes() == bytes, "the way back from a stack leads elsewhere");
    }
    let replaced = put(&again, Over::Replace).expect("what was folded once can be replaced").0;
    assert!(replaced.to_bytes() == folded.to_bytes(), "replacing an adapter by itself changes something");
}

/// A configuration that fits the sites, as far as the graph says; none where it is too large to be of interest.
fn config(model: &Model, sites: &[Site], choice: usize) -> Option<AdapterConfig> {
    let first = sites.first()?;
    let known = |size: Option<i64>| size.and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
    let num_heads = known(first.num_heads).unwrap_or(4);
    let wide = known(first.width).and_then(|width| width.checked_div(num_heads));
    let head_dim = known(first.head_dim).or(wide.filter(|dim| *dim > 0)).unwrap_or(16);
    let (hidden, inner) = widths(model, num_heads.saturating_mul(head_dim));
    let small = num_heads <= MAX_HEADS && head_dim <= MAX_WIDTH && hidden.max(inner) <= MAX_WIDTH * 8;
    let num_layers = Some(locate::num_layers(sites)).filter(|layers| *layers <= MAX_SITES && small)?;
    let method = match choice % 8 {
        0 | 1 => Method::PrefixPlus(PrefixPlus::default()),
        2 => Method::PrefixPlus(PrefixPlus { query: Query::PreRope, rank: Some(1), ..PrefixPlus::default() }),
        3 => Method::PrefixPlus(PrefixPlus { normalizer: true, ..PrefixPlus::default() }),
        4 | 5 => Method::Lora(Lora { rank: 2, ..Lora::default() }),
        _ => Method::Prefix(Prefix { num_virtual_tokens: 2, ..Prefix::default() }),
    };
    Some(AdapterConfig {
        format_version: prefold::adapter::FORMAT_VERSION,
        base_model: None,
        num_layers,
        num_heads,
        num_kv_heads: known(first.num_kv_heads),
        head_dim,
        hidden_size: Some(hidden),
        intermediate_size: Some(inner),
        layers: None,
        method,
    })
}

/// The widths of the residual stream and inside the MLP, as the shapes of constants let guess them.
fn widths(model: &Model, queries: usize) -> (usize, usize) {
    let shapes = || {
        model.graph().initializers().iter().filter_map(|tensor| match tensor.dims() {
            [rows, columns] => Some((usize::try_from(*rows).ok()?, usize::try_from(*columns).ok()?)),
            _ => None,
        })
    };
    let hidden = shapes().find(|(rows, _)| *rows == queries).map_or(queries, |(_, columns)| columns);
    let inner = shapes().filter(|(rows, columns)| *columns == hidden && *rows != queries).map(|(rows, _)| rows);
    (hidden, inner.min().unwrap_or(1))
}

/// A graph that says of itself that it was folded, with a way back that may be anything: the bytes are the steps of the way, or,
/// where they begin with a brace, the whole entry.
pub fn unfold(bytes: &[u8]) {
    let entry = match bytes.first() {
        Some(b'{') => String::from_utf8_lossy(bytes).into_owned(),
        _ => {
            let delta = packed(bytes);
            format!(
                r#"{{"emission": "bank", "config": {{"method": "prefix_plus", "num_layers": 1, "num_heads": 1, "head_dim": 2}},
                "adapters": ["a"], "undo": {{"bytes": {}, "sha256": "", "delta": "{delta}"}}}}"#,
                bytes.len()
            )
        }
    };
    let Some(model) = marked(&entry) else { return };
    if let Ok(records) = Record::all(&model) {
        let _names = records.iter().map(|record| record.input_name("adapter_ids")).collect::<Vec<_>>();
    }
    let _ways = (fold::base(&model).is_ok(), fold::sites(&model).is_ok(), fold::bank_of(&model).is_ok());
    let config = r#"{"method": "prefix_plus", "num_layers": 1, "num_heads": 1, "head_dim": 2}"#;
    let Ok(adapter) = Adapter::zeros(serde_json::from_str(config).expect("a configuration")) else { return };
    let named = [NamedAdapter { name: "two".into(), adapter: adapter.clone() }];
    let nowhere = Path::new(NOWHERE);
    for over in [Over::Stack, Over::Replace] {
        let options = FoldOptions { over, ..FoldOptions::default() };
        let _folded = fold::fold(&model, nowhere, &named, options, nowhere).is_ok();
    }
    let _values = fold::slot_values(&model, nowhere, &adapter).is_ok();
}

/// As a fold keeps its way back: zlib, in hexadecimal.
fn packed(steps: &[u8]) -> String {
    use std::io::Write;
    let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(steps).expect("memory takes it");
    packer.finish().expect("memory takes it").iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A small graph with the entry of a fold.
fn marked(entry: &str) -> Option<Model> {
    let mut builder = onnx::ModelBuilder::new("g", 8);
    let value = |name: &str| onnx::ValueDef::new(name, onnx::DataType::Float, [Dim::Value(2)]);
    builder.opset("", 17).input(value("x")).output(value("y"));
    builder.node(NodeDef::new("Neg", "negate").inputs(["x"]).outputs(["y"]));
    let mut patch = Patch::new("mark");
    patch.set_metadata(fold::MARK, "a").set_metadata(&format!("{}1", fold::RECORDS), entry);
    patch.apply(&builder.build().ok()?).ok()
}

/// What stands beside a graph: an `.onnx_adapter` file, a configuration or manifest as JSON, or an adapter's tensors.
pub fn adapter(bytes: &[u8]) {
    if let Ok(file) = AdapterFile::from_bytes(bytes) {
        let again = AdapterFile::from_bytes(&file.to_bytes()).expect("what is written is read");
        assert!(again == file, "an adapter file is not what it was");
        let _fits = marked("").map(|model| fold::check_adapter_file(&file, &model).is_ok());
    }
    let _manifest = serde_json::from_slice::<Manifest>(bytes);
    if let Ok(config) = serde_json::from_slice::<AdapterConfig>(bytes)
        && config.check().is_ok()
    {
        let small = config.num_layers <= MAX_SITES;
        let _tensors = small.then(|| prefold::adapter::shapes(&config));
    }
}
