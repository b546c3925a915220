//! Mutants of weights in the wrong place, of wiring, of masks of single layers, of the cache, and of what shows in few tokens only.

use prefold::onnx::{Model, TensorDef};

use super::base::indices;
use super::graph::{behind, inner, insert, map, node, op, read, replace_output, swap, swap_maps, values, weight};
use super::{Dialect, Kind, Mutant, at, outside};

/// Width of a head of the model.
const HEAD: usize = 8;
/// Elements `start..end` of an axis, as the inputs of a `Slice`.
const END: i64 = i64::MAX;

fn number(name: &str, value: f32) -> TensorDef {
    TensorDef::from_f32s(name, &[], &[value])
}

fn layers(model: &Model, _: Dialect) -> Model {
    let of_first = |name: &&str| name.starts_with("model.layers.0.");
    let names: Vec<String> =
        model.graph().initializers().iter().map(|t| t.name()).filter(of_first).map(str::to_owned).collect();
    names.iter().fold(model.clone(), |model, name| swap(&model, name, &name.replace("layers.0", "layers.1")))
}

fn keys_and_values(model: &Model, _: Dialect) -> Model {
    swap_maps(model, (1, "self_attn.k_proj"), (1, "self_attn.v_proj"))
}

/// Pairs of neighbours are rotated and not halves: rows of queries and keys in the other order.
fn interleaved(model: &Model, _: Dialect) -> Model {
    let turned = |model: &Model, part: &str| {
        map(model, 0, &format!("self_attn.{part}_proj"), |dims, values| {
            let width = dims[1] as usize;
            let from = |at: usize| {
                let (head, at) = (at / HEAD, at % HEAD);
                head * HEAD + if at < HEAD / 2 { 2 * at } else { 2 * at - HEAD + 1 }
            };
            (0..values.len()).map(|i| values[i / width * width + from(i % width)]).collect()
        })
    };
    turned(&turned(model, "q"), "k")
}

/// Only half of each head is rotated.
fn partial_rotation(model: &Model, _: Dialect) -> Model {
    weight(model, "/model/rotary_emb.0/inv_freq", |_, values| {
        values.iter().enumerate().map(|(at, x)| if at % (HEAD / 2) >= HEAD / 4 { 0.0 } else { *x }).collect()
    })
}

fn no_norm(model: &Model, norm: &str) -> Model {
    let (normed, stream) = (format!("{norm}/Mul"), node(model, &format!("{norm}/Div")).input(0).unwrap().to_owned());
    behind(
        model,
        node(model, &normed).output(0).unwrap(),
        vec![],
        vec![op("Identity", "mutant/stream", &[&stream])],
        "mutant/stream",
    )
}

fn no_mlp_norm(model: &Model, _: Dialect) -> Model {
    no_norm(model, "/model/layers.1/post_attention_layernorm")
}

fn no_final_norm(model: &Model, _: Dialect) -> Model {
    no_norm(model, "/model/norm")
}

/// The head is the embedding, which this model does not tie.
fn tied(model: &Model, _: Dialect) -> Model {
    let head = model.graph().initializers().iter().map(|t| t.name()).find(|name| name.starts_with("lm_head")).unwrap();
    let (shape, embedding) = values(model, "model.embed_tokens.weight");
    weight(model, head, |dims, _| {
        let [rows, columns] = [dims[0] as usize, dims[1] as usize];
        let at = |i: usize| if dims == shape { i } else { i % columns * rows + i / columns };
        (0..embedding.len()).map(|i| embedding[at(i)]).collect()
    })
}

/// Nodes and constants that move a tensor by one along an axis: the first element is gone and the last one stands twice.
fn moved(tensor: &str, axis: i64) -> (Vec<TensorDef>, Vec<prefold::onnx::NodeDef>) {
    let constants = [("first", 1), ("last", -1), ("end", END), ("axis", axis)];
    let constants = constants.map(|(name, value)| indices(&format!("mutant/{name}"), &[value]));
    let slice = |name, start| op("Slice", name, &[tensor, start, "mutant/end", "mutant/axis"]);
    let nodes = vec![
        slice("mutant/rest", "mutant/first"),
        slice("mutant/again", "mutant/last"),
        op("Concat", "mutant/moved", &["mutant/rest", "mutant/again"]).attr_int("axis", axis),
    ];
    (constants.into(), nodes)
}

/// One layer sees a key of the future, and not its first.
fn moved_mask(model: &Model, _: Dialect) -> Model {
    let name = "/model/layers.1/self_attn/Add_bias";
    let (constants, nodes) = moved(node(model, name).input(1).unwrap(), -1);
    insert(model, name, 1, constants, nodes, "mutant/moved")
}

/// The layer itself is right, what it gives out for the next step is not.
fn moved_cache(model: &Model, _: Dialect) -> Model {
    let (constants, nodes) = moved(&inner("present.1.key"), 2);
    replace_output(model, "present.1.key", constants, nodes, "mutant/moved")
}

/// Keys go into the cache before their rotation.
fn unrotated_cache(model: &Model, _: Dialect) -> Model {
    let key = node(model, "/model/layers.0/self_attn/k_rotary/Mul_cos").input(0).unwrap();
    let all = op("Concat", "mutant/all", &["past_key_values.0.key", key]).attr_int("axis", 2);
    replace_output(model, "present.0.key", vec![], vec![all], "mutant/all")
}

/// Rows see a hundredth of the first one.
fn mixed_rows(model: &Model, _: Dialect) -> Model {
    let name = "/model/layers.1/self_attn/o_proj/MatMul";
    let own = node(model, name).input(0).unwrap();
    let nodes = vec![
        op("Gather", "mutant/first", &[own, "mutant/zero"]).attr_int("axis", 0),
        op("Sub", "mutant/other", &["mutant/first", own]),
        op("Mul", "mutant/part", &["mutant/other", "mutant/hundredth"]),
        op("Add", "mutant/mixed", &[own, "mutant/part"]),
    ];
    let constants = vec![indices("mutant/zero", &[0]), number("mutant/hundredth", 0.01)];
    insert(model, name, 0, constants, nodes, "mutant/mixed")
}

/// The first key is hidden from the twentieth token on.
fn forgotten_key(model: &Model, _: Dialect) -> Model {
    let name = "/model/layers.1/self_attn/Softmax";
    let nodes = vec![
        op("GreaterOrEqual", "mutant/late", &["/model/mask/Range_queries/output_0", "mutant/twenty"]),
        op("Unsqueeze", "mutant/queries", &["mutant/late", "mutant/axis"]),
        op("Equal", "mutant/first", &["/model/mask/Range_keys/output_0", "mutant/zero"]),
        op("And", "mutant/hidden", &["mutant/queries", "mutant/first"]),
        op("Where", "mutant/bias", &["mutant/hidden", "mutant/low", "mutant/none"]),
        op("Add", "mutant/scores", &[node(model, name).input(0).unwrap(), "mutant/bias"]),
    ];
    let whole = |name: &str, value| TensorDef::from_i64s(name, &[], &[value]);
    let constants = vec![
        whole("mutant/twenty", 20),
        whole("mutant/zero", 0),
        indices("mutant/axis", &[1]),
        number("mutant/low", -1e4),
        number("mutant/none", 0.0),
    ];
    insert(model, name, 0, constants, nodes, "mutant/scores")
}

fn far_positions(model: &Model, _: Dialect) -> Model {
    let most = TensorDef::from_i64s("mutant/most", &[], &[64]);
    let clamped = op("Min", "mutant/clamped", &["position_ids", "mutant/most"]);
    behind(model, "position_ids", vec![most], vec![clamped], "mutant/clamped")
}

fn slightly(model: &Model, name: &str, part: f32, is_meant: impl Fn(usize, usize) -> bool) -> Model {
    map(model, 1, name, |dims, values| {
        let width = dims[1] as usize;
        let change = |(i, x): (usize, &f32)| if is_meant(i / width, i % width) { x * part } else { *x };
        values.iter().enumerate().map(change).collect()
    })
}

fn tiny_output(model: &Model, _: Dialect) -> Model {
    slightly(model, "self_attn.o_proj", 1.0005, |_, _| true)
}

fn one_weight(model: &Model, _: Dialect) -> Model {
    slightly(model, "mlp.down_proj", 1.05, |row, column| (row, column) == (3, 5))
}

fn one_head(model: &Model, _: Dialect) -> Model {
    slightly(model, "self_attn.q_proj", 1.01, |_, column| (HEAD..2 * HEAD).contains(&column))
}

fn values_under_dora(model: &Model, _: Dialect) -> Model {
    slightly(model, "self_attn.v_proj", 1.05, |_, _| true)
}

fn scaled_logits(model: &Model, _: Dialect) -> Model {
    let scaled = op("Mul", "mutant/scaled", &[&inner("logits"), "mutant/more"]);
    replace_output(model, "logits", vec![number("mutant/more", 1.001)], vec![scaled], "mutant/scaled")
}

fn earlier_logits(model: &Model, _: Dialect) -> Model {
    let (constants, nodes) = moved(&inner("logits"), 1);
    replace_output(model, "logits", constants, nodes, "mutant/moved")
}

/// The residual stream goes on from what was normalised.
fn normed_residual(model: &Model, _: Dialect) -> Model {
    let normed = node(model, "/model/layers.1/input_layernorm/Mul").output(0).unwrap();
    read(model, "/model/layers.1/post_attention_layernorm/Add_residual", 0, normed)
}

/// Key-value heads follow each other for query heads, and are not repeated for neighbours: what is behind attention sees other heads.
fn tiled_heads(model: &Model, _: Dialect) -> Model {
    let order = |name| indices(name, &[0, 2, 1, 3]);
    let (before, after) = ("/model/layers.0/self_attn/Reshape_group", "/model/layers.0/self_attn/Transpose_mixed");
    let turned = |name, tensor, order| op("Gather", name, &[tensor, order]).attr_int("axis", 1);
    let query = node(model, before).input(0).unwrap();
    let nodes = vec![turned("mutant/queries", query, "mutant/order")];
    let model = insert(model, before, 0, vec![order("mutant/order")], nodes, "mutant/queries");
    let mixed = node(&model, after).input(0).unwrap();
    let nodes = vec![turned("mutant/mixed", mixed, "mutant/back")];
    insert(&model, after, 0, vec![order("mutant/back")], nodes, "mutant/mixed")
}

pub fn all() -> Vec<Mutant> {
    let folded = |what, change, place| Mutant::new(what, Kind::Folded, change, place);
    let portable = |what, change, place| folded(what, change, place).only(Dialect::Portable);
    vec![
        folded("two layers are exchanged", layers, at(0, "attention_input")),
        folded("k_proj and v_proj exchanged", keys_and_values, at(1, "key_projection")),
        folded("neighbours are rotated in the place of halves", interleaved, at(0, "query_projection")),
        folded("half of each head is rotated", partial_rotation, at(0, "query")),
        portable("the norm before the MLP is left out", no_mlp_norm, at(1, "mlp_input")),
        portable("the final norm is left out", no_final_norm, outside("final_norm")),
        folded("the head is tied to the embedding", tied, outside("logits")),
        portable("the mask of a layer is one key too early", moved_mask, at(1, "attention_scores")),
        portable("a layer forgets the first key after twenty tokens", forgotten_key, at(1, "attention_scores")),
        folded("the cache is given out one row late", moved_cache, at(1, "keys")),
        portable("keys go into the cache before their rotation", unrotated_cache, at(0, "keys")),
        folded("rows of a batch see the first one", mixed_rows, at(1, "output_input")),
        folded("positions end at 64", far_positions, at(0, "query")).in_case("length_128"),
        folded("o_proj is larger by half a thousandth", tiny_output, at(1, "output_projection")),
        folded("one weight of down_proj is larger by a twentieth", one_weight, at(1, "down_projection")),
        folded("one query head is larger by a hundredth", one_head, at(1, "query_projection")),
        Mutant::new(
            "v_proj beside DoRA is larger by a twentieth",
            Kind::Dora,
            values_under_dora,
            at(1, "value_projection"),
        ),
        folded("the logits are larger by a thousandth", scaled_logits, outside("logits")),
        folded("the logits of a token are those of the next", earlier_logits, outside("logits")),
        portable("the residual stream goes on from the norm", normed_residual, at(1, "attention_residual")),
        portable("key-value heads are tiled and not repeated", tiled_heads, at(0, "attention")),
    ]
}
