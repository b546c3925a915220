use std::path::Path;

use super::*;
use crate::base::testing::shared;
use crate::base::{DecoderSpec, family};
use crate::fold::locate;
use crate::onnx::Model;

fn spec(folder: &Path) -> DecoderSpec {
    let path = folder.join("config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    family::spec_from_config(&path, &config).unwrap()
}

fn find(model: &Model, spec: &DecoderSpec) -> Projections {
    let config = AdapterConfig::new(crate::adapter::Method::Lora(Default::default()), spec, None);
    Projections::find(&Index::new(model.graph()), &locate::sites(model).unwrap(), &config)
}

/// One line for each map of the first layer and the last.
fn lines(model: &Model, spec: &DecoderSpec) -> Vec<String> {
    let found = find(model, spec);
    let layers = [0, spec.num_layers - 1];
    let maps = layers.into_iter().flat_map(|layer| spec.linears().map(move |linear| (layer, linear)));
    maps.map(|(layer, linear)| {
        let map = found.get(layer, linear).unwrap_or_else(|e| panic!("{layer} {linear:?}: {e}"));
        let columns = match map.columns.as_deref() {
            None => "all".to_owned(),
            Some(list) => {
                let runs = list.chunk_by(|a, b| a + 1 == *b).map(|run| format!("{}..{}", run[0], run[run.len() - 1] + 1));
                runs.collect::<Vec<_>>().join(" ")
            }
        };
        let bias = map.node.bias.as_deref().map_or(String::new(), |bias| format!(" + {bias}"));
        format!("{layer} {linear:?}: {} {}{bias} [{columns}]", map.node.op_type, map.node.weight)
    })
    .collect()
}

/// Every graph whose sites are found shows every linear map of every layer, under whatever names.
#[test]
fn every_map_of_every_graph_at_hand_is_found() {
    let (Some(graphs), Some(oracles)) = (shared("graphs"), shared("oracles")) else { return };
    let mut seen = 0;
    for exporter in std::fs::read_dir(graphs).unwrap().map(|e| e.unwrap().path()) {
        for folder in std::fs::read_dir(exporter).unwrap().map(|e| e.unwrap().path()) {
            let model = Model::open(&folder).unwrap();
            if locate::sites(&model).is_err() {
                continue;
            }
            let spec = spec(&oracles.join(folder.file_name().unwrap()));
            eprintln!("{}\n  {}", folder.display(), lines(&model, &spec).join("\n  "));
            let found = find(&model, &spec);
            for layer in 0..spec.num_layers {
                for linear in spec.linears() {
                    found.get(layer, linear).unwrap_or_else(|e| panic!("{}: {layer} {linear:?}: {e}", folder.display()));
                }
            }
            seen += 1;
        }
    }
    assert!(seen > 3, "{seen}");
}
