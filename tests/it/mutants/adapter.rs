//! Mutants of what a fold writes.

use prefold::onnx::{Model, TensorDef};

use super::graph::{insert, node, op, read, rounded, swap, values, weight};
use super::{Dialect, Kind, Mutant, at};

/// The node of a layer's term that reads the query.
fn query_reader(layer: usize) -> String {
    format!("/prefold.1/layers.{layer}/Elu")
}

fn m(layer: usize) -> String {
    format!("prefold.layers.{layer}.M")
}

fn wrong_layer(model: &Model, _: Dialect) -> Model {
    let other = values(model, &m(1)).1;
    weight(model, &m(0), |_, _| other.clone())
}

fn layers_swapped(model: &Model, _: Dialect) -> Model {
    swap(model, &m(0), &m(1))
}

fn transposed(model: &Model, _: Dialect) -> Model {
    weight(model, &m(1), |dims, values| {
        let (rows, columns) = (dims[1] as usize, dims[2] as usize);
        let of_head =
            |head: &[f32]| (0..rows * columns).map(|at| head[at % rows * columns + at / rows]).collect::<Vec<_>>();
        values.chunks(rows * columns).flat_map(of_head).collect()
    })
}

fn heads_reordered(model: &Model, _: Dialect) -> Model {
    weight(model, &m(0), |dims, values| {
        let size = (dims[1] * dims[2]) as usize;
        [0, 2, 1, 3].iter().flat_map(|head| values[head * size..(head + 1) * size].to_vec()).collect()
    })
}

fn rounded_to_bf16(model: &Model, _: Dialect) -> Model {
    weight(model, &m(1), |_, values| rounded(values, 7))
}

fn scaled_query(model: &Model, _: Dialect) -> Model {
    let reader = query_reader(0);
    let query = node(model, &reader).input(0).unwrap();
    let scale = TensorDef::from_f32s("mutant/scale", &[], &[8f32.sqrt().recip()]);
    let scaled = op("Mul", "mutant/scaled", &[query, "mutant/scale"]);
    insert(model, &reader, 0, vec![scale], vec![scaled], "mutant/scaled")
}

fn before_rotation(model: &Model, dialect: Dialect) -> Model {
    let tensor = match dialect {
        Dialect::Portable => "/model/layers.0/self_attn/q/Transpose/output_0",
        Dialect::Ort => "/model/layers.0/self_attn/q_proj/output_0",
    };
    read(model, &query_reader(0), 0, tensor)
}

fn missing_term(model: &Model, dialect: Dialect) -> Model {
    match dialect {
        Dialect::Portable => {
            let attention = "/model/layers.1/self_attn/Reshape_ungroup/output_0";
            read(model, "/model/layers.1/self_attn/Transpose_mixed", 0, attention)
        }
        Dialect::Ort => {
            let attention = "/model/layers.1/self_attn/GroupQueryAttention/output_0";
            read(model, "/model/layers.1/self_attn/o_proj/MatMul", 0, attention)
        }
    }
}

fn other_slot(model: &Model, _: Dialect) -> Model {
    read(model, "/prefold.1/layers.0/MatMul", 1, node(model, "/prefold.1/layers.1/MatMul").input(1).unwrap())
}

fn bank_row(model: &Model, _: Dialect) -> Model {
    let reader = model.graph().nodes().iter().find(|node| node.inputs().iter().any(|input| input == "adapter_ids"));
    let reader = reader.unwrap().name().to_owned();
    let slot = node(model, &reader).inputs().iter().position(|input| input == "adapter_ids").unwrap();
    let one = TensorDef::from_i64s("mutant/one", &[], &[1]);
    insert(model, &reader, slot, vec![one], vec![op("Sub", "mutant/row", &["adapter_ids", "mutant/one"])], "mutant/row")
}

fn unchanged(model: &Model, _: Dialect) -> Model {
    model.clone()
}

pub fn all() -> Vec<Mutant> {
    let term = |layer| at(layer, "term");
    let folded = |what, change, place| Mutant::new(what, Kind::Folded, change, place);
    let other = |what, adapter| Mutant::new(what, Kind::Other(adapter), unchanged, term(0));
    vec![
        folded("layer 0 has the M of layer 1", wrong_layer, term(0)),
        folded("the M of two layers are exchanged", layers_swapped, term(0)),
        folded("M is transposed", transposed, term(1)),
        folded("M of two query heads exchanged", heads_reordered, term(0)),
        folded("M rounded to bf16", rounded_to_bf16, term(1)),
        folded("the query is taken after the scale", scaled_query, term(0)),
        folded("the query is taken before the rotation", before_rotation, term(0)),
        folded("a layer's term is left out", missing_term, at(1, "output_input")),
        other("the gate is ignored", "gated"),
        other("elu in the place of elu + 1", "elu_plus_one"),
        other("elu in the place of relu", "relu"),
        Mutant::new("a slot is read from another layer", Kind::Slot, other_slot, term(0)),
        Mutant::new("the bank's row is off by one", Kind::Bank, bank_row, term(0)),
    ]
}
