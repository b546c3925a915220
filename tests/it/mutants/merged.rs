//! Layers in the branches of an `If`, as optimum's merged decoders hold them: one branch for a prompt, one for what follows it. One of the
//! two is broken.

use prefold::onnx::{Graph, Model, Node, NodeDef, NodeId, Patch, TensorDef};
use serde_json::{Value, json};

use super::{Dialect, Kind, Mutant, adapter, base, dialects, wiring};
use crate::support::{arg, prefold, prefold_ok, shared};

/// A branch of a merged decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// What computes a prompt.
    Prompt,
    /// What goes on from a cache.
    Next,
}

impl Branch {
    fn attribute(self) -> &'static str {
        if self == Self::Prompt { "else_branch" } else { "then_branch" }
    }

    /// The branch by the name that a report has for it.
    pub fn scope(self) -> String {
        format!("optimum::if.{}", self.attribute())
    }
}

/// A field of a message: its number, its bytes, and its payload where it has a length.
struct Field<'b> {
    number: u64,
    raw: &'b [u8],
    payload: &'b [u8],
}

fn varint(bytes: &[u8], at: &mut usize) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[*at];
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

fn fields(bytes: &[u8]) -> Vec<Field<'_>> {
    let (mut all, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let start = at;
        let key = varint(bytes, &mut at);
        let length = match key & 7 {
            0 => {
                varint(bytes, &mut at);
                0
            }
            1 => 8,
            5 => 4,
            _ => varint(bytes, &mut at) as usize,
        };
        let payload = &bytes[at..at + length];
        at += length;
        all.push(Field { number: key >> 3, raw: &bytes[start..at], payload });
    }
    all
}

fn message(number: u8, content: &[u8]) -> Vec<u8> {
    let (mut out, mut length) = (vec![number << 3 | 2], content.len());
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    [&out, content].concat()
}

const GRAPH: u64 = 7;
const METADATA: u64 = 14;
const GRAPH_INPUT: u64 = 11;
const GRAPH_OUTPUT: u64 = 12;

fn graph_of(model: &[u8]) -> Vec<Field<'_>> {
    fields(fields(model).iter().find(|field| field.number == GRAPH).unwrap().payload)
}

/// A merged decoder of two graphs with the same ports, whose tensors have the same names too.
pub fn merged(prompt: &Model, next: &Model) -> Model {
    let (prompt, next) = (prompt.to_bytes(), next.to_bytes());
    let ports = |number| graph_of(&prompt).into_iter().filter(move |field| field.number == number);
    let branch = |name: &str, model: &[u8]| {
        let own = graph_of(model).into_iter().filter(|field| field.number != GRAPH_INPUT);
        let graph: Vec<u8> = own.flat_map(|field| field.raw.to_vec()).collect();
        // its type, field 20, is that of a graph: 5
        message(5, &[message(1, name.as_bytes()), message(6, &graph), vec![0xa0, 1, 5]].concat())
    };
    let outputs = ports(GRAPH_OUTPUT).flat_map(|output| message(2, fields(output.payload)[0].payload));
    let node = [
        message(1, b"use_cache_branch"),
        outputs.collect(),
        message(3, b"optimum::if"),
        message(4, b"If"),
        branch("then_branch", &next),
        branch("else_branch", &prompt),
    ];
    let one = message(2, &message(1, &[0x08, 1]));
    let bool_vector = message(2, &message(1, &[&[0x08, 9][..], &one].concat()));
    let condition = message(GRAPH_INPUT as u8, &[message(1, b"use_cache_branch"), bool_vector].concat());
    let raw = |number| ports(number).flat_map(|field| field.raw.to_vec()).collect::<Vec<u8>>();
    let graph =
        [message(1, &node.concat()), message(2, b"merged"), raw(GRAPH_INPUT), condition, raw(GRAPH_OUTPUT)].concat();
    let rest = fields(&prompt).into_iter().filter(|field| ![GRAPH, METADATA].contains(&field.number));
    let rest: Vec<u8> = rest.flat_map(|field| field.raw.to_vec()).collect();
    Model::from_bytes([rest, message(GRAPH as u8, &graph)].concat()).unwrap()
}

/// Mutants of the other tables, in one branch.
pub fn all() -> Vec<Mutant> {
    let known = || adapter::all().into_iter().chain(base::all()).chain(wiring::all());
    let within = |what, branch, of: &str| {
        let mutant = known().find(|mutant| mutant.what == of).unwrap();
        Mutant { what, kind: Kind::Merged(branch), ..mutant }
    };
    let prompt = |what, of| within(what, Branch::Prompt, of);
    let next = |what, of| within(what, Branch::Next, of);
    vec![
        prompt("the branch for a prompt: layer 0 has the M of layer 1", "layer 0 has the M of layer 1"),
        prompt("the branch for a prompt: M is transposed", "M is transposed"),
        prompt("the branch for a prompt: the query is taken after the scale", "the query is taken after the scale"),
        prompt("the branch for a prompt: the padding mask is dropped", "the padding mask is dropped"),
        prompt("the branch for a prompt: the residual stream skips a layer", "the residual stream skips a layer"),
        next("the branch with a cache: layer 0 has the M of layer 1", "layer 0 has the M of layer 1"),
        next("the branch with a cache: M is transposed", "M is transposed"),
        next("the branch with a cache: the query is taken after the scale", "the query is taken after the scale"),
        next("the branch with a cache: the padding mask is dropped", "the padding mask is dropped")
            .in_case("cached_decode_left_padding"),
        next("the branch with a cache: a row of the cached keys is stale", "a row of the cached keys is stale"),
        next("the branch with a cache: the residual stream skips a layer", "the residual stream skips a layer"),
        next("the branch with a cache: the head is rounded as TF32 does", "the head is rounded as TF32 does"),
    ]
}

/// A change of one branch of optimum's graph, of whose names the branch for a prompt has others.
type Change = fn(&Graph, &str, &mut Patch);

fn within<'g>(graph: &'g Graph, name: &str) -> &'g Node {
    graph.nodes().iter().find(|node| node.name().ends_with(name)).unwrap_or_else(|| panic!("there is no node {name}"))
}

fn mul(patch: &mut Patch, before: NodeId, slot: usize, tensor: &str, by: f32) {
    let node = NodeDef::new("Mul", "mutant/scaled").inputs([tensor, "mutant/by"]).outputs(["mutant/scaled"]);
    patch.add_initializer(TensorDef::from_f32s("mutant/by", &[], &[by])).insert_before(before, node);
    patch.replace_input(before, slot, "mutant/scaled");
}

fn scaled_query(graph: &Graph, _: &str, patch: &mut Patch) {
    let elu = within(graph, "/layers.0/Elu");
    mul(patch, elu.id(), 0, elu.input(0).unwrap(), 8f32.sqrt().recip());
}

fn other_m(graph: &Graph, _: &str, patch: &mut Patch) {
    patch.replace_input(within(graph, "_branch/layers.1/MatMul").id(), 1, "prefold.layers.0.M");
}

fn transposed(graph: &Graph, _: &str, patch: &mut Patch) {
    let product = within(graph, "_branch/layers.1/MatMul");
    let turned = NodeDef::new("Transpose", "mutant/turned").inputs([product.input(1).unwrap()]);
    patch.insert_before(product.id(), turned.outputs(["mutant/turned"]).attr_ints("perm", &[0, 2, 1]));
    patch.replace_input(product.id(), 1, "mutant/turned");
}

fn missing_term(graph: &Graph, _: &str, patch: &mut Patch) {
    let sum = within(graph, "_branch/layers.1/Add");
    let (attention, sum) = (sum.input(0).unwrap(), sum.output(0).unwrap());
    let reader = graph.nodes().iter().find(|node| node.input(0) == Some(sum)).unwrap();
    patch.replace_input(reader.id(), 0, attention);
}

fn no_mask(graph: &Graph, _: &str, patch: &mut Patch) {
    let masked = within(graph, "layers.1/self_attn/Add_2");
    patch.replace_input(within(graph, "layers.1/self_attn/Softmax").id(), 0, masked.input(0).unwrap());
}

fn residual(graph: &Graph, root: &str, patch: &mut Patch) {
    let sum = within(graph, "model/layers.1/Add");
    patch.replace_input(sum.id(), 0, format!("{root}/model/embed_tokens/Gather_output_0"));
}

fn activation(graph: &Graph, _: &str, patch: &mut Patch) {
    let sigmoid = within(graph, "layers.1/mlp/act_fn/Sigmoid");
    mul(patch, sigmoid.id(), 0, sigmoid.input(0).unwrap(), 1.01);
}

/// optimum's own merged decoder with an adapter in both branches.
#[test]
fn a_mutant_in_a_branch_of_optimum_s_merged_decoder_is_placed() {
    if !dialects().contains(&Dialect::Ort) {
        return;
    }
    let (Some(graph), Some(model)) =
        (shared("graphs/optimum_merged/llama_gqa/decoder_model_merged.onnx"), shared("oracles/llama_gqa"))
    else {
        return;
    };
    let adapter = model.join("adapter.safetensors");
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    prefold_ok(at, &["fold", "--graph", arg(&graph), "--adapter", arg(&adapter), "--out", "folded"]);
    let folded = Model::open(&at.join("folded")).unwrap();
    let changes: [(Change, u64, &str); 7] = [
        (scaled_query, 0, "term"),
        (other_m, 1, "term"),
        (transposed, 1, "term"),
        (missing_term, 1, "output_input"),
        (no_mask, 1, "attention_weights"),
        (residual, 1, "attention_residual"),
        (activation, 1, "mlp_inner"),
    ];
    let both = [(Branch::Prompt, "/m"), (Branch::Next, "")];
    for (number, (change, layer, place)) in changes.into_iter().enumerate() {
        for (branch, root) in both {
            let node = folded.graph().nodes().iter().find(|node| node.name() == "optimum::if").unwrap();
            let attribute = node.attributes().iter().find(|found| found.name() == branch.attribute()).unwrap();
            let mut patch = Patch::new("mutant");
            change(&attribute.graphs()[0], root, &mut patch);
            let name = format!("{number}{}", branch.attribute());
            std::fs::create_dir(at.join(&name)).unwrap();
            patch.apply(&folded).unwrap().save(&at.join(&name).join("model.onnx")).unwrap();
            let cases = if number == 4 && branch == Branch::Next {
                "cached_decode_left_padding"
            } else {
                "left_padding,cached_decode"
            };
            let args = ["verify", "--graph", name.as_str(), "--base-graph", arg(&graph), "--model", arg(&model)];
            let more = ["--adapter", arg(&adapter), "--runtime", "ort", "--case", cases, "--steps", "2", "--no-cache"];
            let output = prefold(at, &[args.as_slice(), &more, &["--out", "parity.json"]].concat());
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{name}: {text}");
            let report: Value = serde_json::from_slice(&std::fs::read(at.join("parity.json")).unwrap()).unwrap();
            let departure = &report["runs"][0]["departure"];
            let found = ["layer", "place", "branch"].map(|field| departure[field].clone());
            let expected = [json!(layer), json!(place), json!(branch.scope())];
            assert_eq!(found, expected, "{name}: {departure:#} {text}");
            assert_eq!(departure["call"].as_u64().unwrap() > 0, branch == Branch::Next, "{name}: {departure:#}");
            assert_eq!(departure["fault"], "graph", "{name}: {departure:#}");
            let reproducer = at.join(departure["reproducer"].as_str().unwrap()).join("model.onnx");
            assert!(Model::open(&reproducer).unwrap().graph().nodes().len() < 64, "{name}: {departure:#}");
        }
    }
}
