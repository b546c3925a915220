//! The two tables of an `.onnx_adapter` file, by the offsets of their fields: field i of a table is entry `4 + 2 i` of its
//! vtable.
//!
//! Reading a flatbuffer follows offsets without checks. That is sound here because [`read`] hands out no table before the
//! verifier has walked all of it with the same two field lists as below: every offset, vector, string and number that is read
//! afterwards lies in the buffer, is aligned, and strings are UTF-8.
#![allow(unsafe_code)]

use flatbuffers::{
    FlatBufferBuilder, Follow, ForwardsUOffset, InvalidFlatbuffer, Table, VOffsetT, Vector, Verifiable, Verifier,
    VerifierOptions, WIPOffset,
};

use super::{AdapterFile, AdapterParameter};
use crate::onnx::DataType;

const IDENTIFIER: &str = "TORT";
/// Where the root's offset and the identifier end.
const HEADER: usize = 8;
const ALIGNMENT: usize = 8;

const FORMAT_VERSION: VOffsetT = 4;
const ADAPTER_VERSION: VOffsetT = 6;
const MODEL_VERSION: VOffsetT = 8;
const PARAMETERS: VOffsetT = 10;

const NAME: VOffsetT = 4;
const DIMS: VOffsetT = 6;
const DATA_TYPE: VOffsetT = 8;
const RAW_DATA: VOffsetT = 10;

type Reference<T> = ForwardsUOffset<T>;

struct AdapterTable<'a>(Table<'a>);

struct ParameterTable<'a>(Table<'a>);

impl<'a> Follow<'a> for AdapterTable<'a> {
    type Inner = Self;
    // SAFETY: the caller's promise, a table at `loc`, is passed on
    unsafe fn follow(buf: &'a [u8], loc: usize) -> Self {
        Self(unsafe { Table::new(buf, loc) })
    }
}

impl<'a> Follow<'a> for ParameterTable<'a> {
    type Inner = Self;
    // SAFETY: the caller's promise, a table at `loc`, is passed on
    unsafe fn follow(buf: &'a [u8], loc: usize) -> Self {
        Self(unsafe { Table::new(buf, loc) })
    }
}

impl Verifiable for AdapterTable<'_> {
    fn run_verifier(verifier: &mut Verifier, at: usize) -> Result<(), InvalidFlatbuffer> {
        verifier
            .visit_table(at)?
            .visit_field::<i32>("format_version", FORMAT_VERSION, false)?
            .visit_field::<i32>("adapter_version", ADAPTER_VERSION, false)?
            .visit_field::<i32>("model_version", MODEL_VERSION, false)?
            .visit_field::<Reference<Vector<Reference<ParameterTable>>>>("parameters", PARAMETERS, false)?
            .finish();
        Ok(())
    }
}

impl Verifiable for ParameterTable<'_> {
    fn run_verifier(verifier: &mut Verifier, at: usize) -> Result<(), InvalidFlatbuffer> {
        verifier
            .visit_table(at)?
            .visit_field::<Reference<&str>>("name", NAME, true)?
            .visit_field::<Reference<Vector<i64>>>("dims", DIMS, false)?
            .visit_field::<i32>("data_type", DATA_TYPE, false)?
            .visit_field::<Reference<Vector<u8>>>("raw_data", RAW_DATA, true)?
            .finish();
        Ok(())
    }
}

/// The version of the format and the content, or what is wrong.
pub(super) fn read(bytes: &[u8]) -> Result<(i32, AdapterFile), String> {
    if bytes.get(HEADER - IDENTIFIER.len()..HEADER) != Some(IDENTIFIER.as_bytes()) {
        return Err("it does not begin as such a file does (identifier TORT)".into());
    }
    // the buffer may be larger than the verifier's default of 2 GiB; a hostile one may name a part of it many times
    let options = VerifierOptions { max_apparent_size: bytes.len().saturating_mul(2), ..VerifierOptions::default() };
    let table = flatbuffers::root_with_opts::<AdapterTable>(&options, bytes).map_err(|error| {
        let text = error.to_string();
        format!("it is damaged: {}", text.lines().next().unwrap_or_default().trim_end_matches('.'))
    })?;
    let table = table.0;
    // SAFETY: `root_with_opts` has verified this table, with these types at these offsets
    let (format, adapter_version, model_version, parameters) = unsafe {
        (
            table.get::<i32>(FORMAT_VERSION, Some(0)),
            table.get::<i32>(ADAPTER_VERSION, Some(0)),
            table.get::<i32>(MODEL_VERSION, Some(0)),
            table.get::<Reference<Vector<Reference<ParameterTable>>>>(PARAMETERS, None),
        )
    };
    let parameters = parameters.into_iter().flat_map(|parameters| parameters.iter()).map(parameter).collect();
    let file = AdapterFile {
        adapter_version: adapter_version.unwrap_or_default(),
        model_version: model_version.unwrap_or_default(),
        parameters,
    };
    Ok((format.unwrap_or_default(), file))
}

fn parameter(table: ParameterTable) -> AdapterParameter {
    let table = table.0;
    // SAFETY: the table is an element of a vector that `read` has verified, with these types at these offsets
    let (name, dims, data_type, bytes) = unsafe {
        (
            table.get::<Reference<&str>>(NAME, None),
            table.get::<Reference<Vector<i64>>>(DIMS, None),
            table.get::<i32>(DATA_TYPE, Some(0)),
            table.get::<Reference<Vector<u8>>>(RAW_DATA, None),
        )
    };
    AdapterParameter {
        name: name.unwrap_or_default().to_owned(),
        data_type: DataType::from_code(data_type.unwrap_or_default()),
        dims: dims.into_iter().flat_map(|dims| dims.iter()).collect(),
        bytes: bytes.map(|bytes| bytes.bytes().to_vec()).unwrap_or_default(),
    }
}

/// A file's bytes.
pub(super) fn write(format: i32, file: &AdapterFile) -> Vec<u8> {
    let mut builder = FlatBufferBuilder::new();
    let parameters: Vec<WIPOffset<_>> = file
        .parameters
        .iter()
        .map(|parameter| {
            let raw = aligned(&mut builder, &parameter.bytes);
            let dims = builder.create_vector(&parameter.dims);
            let name = builder.create_string(&parameter.name);
            let table = builder.start_table();
            builder.push_slot_always(NAME, name);
            builder.push_slot_always(DIMS, dims);
            builder.push_slot::<i32>(DATA_TYPE, parameter.data_type.code(), 0);
            builder.push_slot_always(RAW_DATA, raw);
            builder.end_table(table)
        })
        .collect();
    let parameters = builder.create_vector(&parameters);
    let table = builder.start_table();
    builder.push_slot::<i32>(FORMAT_VERSION, format, 0);
    builder.push_slot::<i32>(ADAPTER_VERSION, file.adapter_version, 0);
    builder.push_slot::<i32>(MODEL_VERSION, file.model_version, 0);
    builder.push_slot_always(PARAMETERS, parameters);
    let root = builder.end_table(table);
    builder.finish(root, Some(IDENTIFIER));
    builder.finished_data().to_vec()
}

/// A vector of bytes whose first lies at a multiple of [`ALIGNMENT`]. A buffer is built from its end, and the vectors of 64-bit
/// dimensions make that end a multiple of eight, so that what follows the bytes is filled up.
fn aligned<'a>(builder: &mut FlatBufferBuilder<'a>, bytes: &[u8]) -> WIPOffset<Vector<'a, u8>> {
    while !(builder.unfinished_data().len() + bytes.len()).is_multiple_of(ALIGNMENT) {
        builder.push(0u8);
    }
    builder.create_vector(bytes)
}
