//! Trained keys and values before those of the tokens, in a graph that prefold exported. The cache stays that of the tokens:
//! what goes in and out of the graph does not hold the prefix.
//!
//! ```text
//! prefix [1, kv, n, d] ─ Expand ─ Concat ─► what reads present.N.key | value
//! present.N.key | value ────────────┘
//! position_ids ─ Add n                       bias ─ Pad n columns of zero on the left ─► Add_bias
//! ```
//! Not in GroupQueryAttention: it joins past and new keys itself, so that a prefix could only be a past, and ONNX Runtime takes
//! a past together with several new tokens in batches of one row alone.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::Job;
use crate::adapter::Prefix;
use crate::fold::{Error, Result, Site};
use crate::onnx::{Index, Node, NodeDef, NodeId};

const DOMAIN: &str = "com.microsoft";
const HELP: &str = "export the base model with `prefold export`, in the portable dialect";

pub(super) fn write(job: &mut Job, prefix: &Prefix) -> Result<()> {
    let model = job.model;
    let index = Index::new(model.graph());
    if model.metadata("prefold.dialect").is_none() || index.input("position_ids").is_none() {
        let what = "prefix tuning in a graph that prefold did not export".into();
        return Err(Error::NotFolded { what, help: HELP });
    }
    let windowed = |node: &Node| node.name().starts_with("/model/mask/window_");
    if model.graph().nodes().iter().any(windowed) {
        let what = "prefix tuning of a model with sliding windows".into();
        return Err(Error::NotFolded { what, help: "run it in candle: prefold generate --model … --adapter …" });
    }
    if model.graph().nodes().iter().any(|node| node.is(DOMAIN, "GroupQueryAttention")) {
        let what = "prefix tuning in a graph with GroupQueryAttention".into();
        return Err(Error::NotFolded { what, help: "export the base model with --dialect portable" });
    }
    let length = prefix.num_virtual_tokens as i64;
    let mut writer = Writer { job, index: &index, length, biases: BTreeMap::new() };
    writer.shift_positions();
    let batch = writer.batch_shape();
    for site in writer.job.sites {
        let config = writer.job.adapter.config();
        let found = prefix.keys_and_values(config, writer.job.adapter.tensors(), site.layer);
        let Some((key, value)) = found.map_err(Error::Convert)? else { continue };
        let node = index.graph().nodes().iter().find(|node| node.name() == site.anchor);
        let Some(node) = node else { return Err(stopped(site, "its node is not in the graph")) };
        let key = writer.expanded(site.layer, "key", &key, &batch)?;
        let value = writer.expanded(site.layer, "value", &value, &batch)?;
        writer.join(site, node, &key, &value)?;
    }
    Ok(())
}

fn stopped(site: &Site, reason: &str) -> Error {
    Error::Site { anchor: site.anchor.clone(), reason: reason.into(), help: HELP }
}

struct Writer<'a, 'j> {
    job: &'a mut Job<'j>,
    index: &'a Index<'a>,
    /// Positions of the prefix.
    length: i64,
    /// Padded biases by what they were before.
    biases: BTreeMap<String, String>,
}

impl Writer<'_, '_> {
    fn node(&mut self, before: NodeId, node: NodeDef, inputs: &[&str]) -> String {
        let output = format!("{}/output_0", node.name());
        self.job.patch.insert_before(before, node.inputs(inputs.iter().copied()).outputs([output.as_str()]));
        output
    }

    /// The tokens' positions follow the prefix.
    fn shift_positions(&mut self) {
        let readers = self.index.consumers("position_ids");
        let Some(first) = readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()) else { return };
        let length = self.job.constants.integers(&mut self.job.patch, "prefold/prefix_length", &[self.length]);
        let shifted = self.node(first, NodeDef::new("Add", "/prefold/positions/Add"), &["position_ids", &length]);
        for reader in readers {
            self.job.patch.replace_input(reader.node, reader.slot, shifted.as_str());
        }
    }

    /// `[batch, 1, 1, 1]` as a shape.
    fn batch_shape(&mut self) -> String {
        let first = NodeId(0);
        let (zero, one) = (self.list("prefold/zero", &[0]), self.list("prefold/one", &[1]));
        let ones = self.list("prefold/ones", &[1, 1, 1]);
        let shape = self.node(first, NodeDef::new("Shape", "/prefold/batch/Shape"), &["input_ids"]);
        let batch = self.node(first, NodeDef::new("Slice", "/prefold/batch/Slice"), &[&shape, &zero, &one]);
        self.node(first, NodeDef::new("Concat", "/prefold/batch/Concat").attr_int("axis", 0), &[&batch, &ones])
    }

    fn list(&mut self, name: &str, values: &[i64]) -> String {
        self.job.constants.integers(&mut self.job.patch, name, values)
    }

    /// The trained keys or values once for every row of the batch.
    fn expanded(&mut self, layer: usize, part: &str, tensor: &Tensor, batch: &str) -> Result<String> {
        let rows = tensor.to_dtype(DType::F64).and_then(|t| t.unsqueeze(0)).map_err(Error::Convert)?;
        let name = format!("prefold.layers.{layer}.{part}");
        let constant = self.job.constants.add(&mut self.job.patch, &name, &rows)?;
        let node = NodeDef::new("Expand", format!("/prefold/layers.{layer}/Expand_{part}"));
        Ok(self.node(NodeId(0), node, &[&constant, batch]))
    }

    fn concat(&mut self, before: NodeId, layer: usize, part: &str, prefix: &str, own: &str) -> String {
        let node = NodeDef::new("Concat", format!("/prefold/layers.{layer}/Concat_{part}")).attr_int("axis", 2);
        self.node(before, node, &[prefix, own])
    }

    /// A bias over the keys with columns of zero for the prefix.
    fn padded(&mut self, before: NodeId, bias: &str, rank: usize) -> Result<String> {
        if let Some(padded) = self.biases.get(bias) {
            return Ok(padded.clone());
        }
        let mut pads = vec![0; 2 * rank];
        if let Some(last) = pads.get_mut(rank - 1) {
            *last = self.length;
        }
        let pads = self.list(&format!("prefold/pads_{rank}"), &pads);
        let zero = self.job.constants.number(&mut self.job.patch, "prefold/number_0", 0.0)?;
        let name = format!("/prefold/mask/Pad_{}", self.biases.len());
        let padded = self.node(before, NodeDef::new("Pad", name), &[bias, &pads, &zero]);
        self.biases.insert(bias.to_owned(), padded.clone());
        Ok(padded)
    }

    fn join(&mut self, site: &Site, softmax: &Node, key: &str, value: &str) -> Result<()> {
        let index = self.index;
        for (part, prefix) in [("key", key), ("value", value)] {
            let present = format!("present.{}.{part}", site.layer);
            let readers = index.consumers(&present);
            let Some(first) = readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()) else {
                return Err(stopped(site, "its cache is not read from the output of the graph"));
            };
            let joined = self.concat(first, site.layer, part, prefix, &present);
            for reader in readers {
                self.job.patch.replace_input(reader.node, reader.slot, joined.as_str());
            }
        }
        let add = softmax.input(0).and_then(|scores| index.producer(scores)).filter(|node| node.is("", "Add"));
        let Some((add, bias)) = add.and_then(|add| Some((add, add.input(1)?))) else {
            return Err(stopped(site, "no bias is added to its scores"));
        };
        // [batch, kv_heads, group, seq, total]
        let padded = self.padded(add.id(), bias, 5)?;
        self.job.patch.replace_input(add.id(), 1, padded);
        Ok(())
    }
}
