//! Field numbers of the ONNX messages, from the ONNX IR specification: <https://onnx.ai/onnx/repo-docs/IR.html> and
//! <https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>.

/// `ModelProto`.
pub(crate) mod model {
    pub const MESSAGE: &str = "ModelProto";
    pub const IR_VERSION: u32 = 1;
    pub const PRODUCER_NAME: u32 = 2;
    pub const PRODUCER_VERSION: u32 = 3;
    pub const GRAPH: u32 = 7;
    pub const OPSET_IMPORT: u32 = 8;
    pub const METADATA_PROPS: u32 = 14;
    pub const TRAINING_INFO: u32 = 20;
    pub const FUNCTIONS: u32 = 25;
}

/// `OperatorSetIdProto`.
pub(crate) mod opset {
    pub const MESSAGE: &str = "OperatorSetIdProto";
    pub const DOMAIN: u32 = 1;
    pub const VERSION: u32 = 2;
}

/// `StringStringEntryProto`.
pub(crate) mod entry {
    pub const MESSAGE: &str = "StringStringEntryProto";
    pub const KEY: u32 = 1;
    pub const VALUE: u32 = 2;
}

/// `GraphProto`.
pub(crate) mod graph {
    pub const MESSAGE: &str = "GraphProto";
    pub const NODE: u32 = 1;
    pub const NAME: u32 = 2;
    pub const INITIALIZER: u32 = 5;
    pub const INPUT: u32 = 11;
    pub const OUTPUT: u32 = 12;
    pub const VALUE_INFO: u32 = 13;
    pub const SPARSE_INITIALIZER: u32 = 15;
}

/// `NodeProto`.
pub(crate) mod node {
    pub const MESSAGE: &str = "NodeProto";
    pub const INPUT: u32 = 1;
    pub const OUTPUT: u32 = 2;
    pub const NAME: u32 = 3;
    pub const OP_TYPE: u32 = 4;
    pub const ATTRIBUTE: u32 = 5;
    pub const DOMAIN: u32 = 7;
    pub const OVERLOAD: u32 = 8;
}

/// `AttributeProto` and its `AttributeType`.
pub(crate) mod attribute {
    pub const MESSAGE: &str = "AttributeProto";
    pub const NAME: u32 = 1;
    pub const F: u32 = 2;
    pub const I: u32 = 3;
    pub const S: u32 = 4;
    pub const T: u32 = 5;
    pub const G: u32 = 6;
    pub const FLOATS: u32 = 7;
    pub const INTS: u32 = 8;
    pub const STRINGS: u32 = 9;
    pub const TENSORS: u32 = 10;
    pub const GRAPHS: u32 = 11;
    pub const TYPE: u32 = 20;
    pub const REF_ATTR_NAME: u32 = 21;
    pub const SPARSE_TENSOR: u32 = 22;
    pub const SPARSE_TENSORS: u32 = 23;

    pub const TYPE_FLOAT: i64 = 1;
    pub const TYPE_INT: i64 = 2;
    pub const TYPE_STRING: i64 = 3;
    pub const TYPE_TENSOR: i64 = 4;
    pub const TYPE_GRAPH: i64 = 5;
    pub const TYPE_FLOATS: i64 = 6;
    pub const TYPE_INTS: i64 = 7;
    pub const TYPE_STRINGS: i64 = 8;
    pub const TYPE_TENSORS: i64 = 9;
    pub const TYPE_GRAPHS: i64 = 10;
    pub const TYPE_SPARSE_TENSOR: i64 = 11;
    pub const TYPE_SPARSE_TENSORS: i64 = 12;
}

/// `TensorProto` and its `DataLocation`.
pub(crate) mod tensor {
    pub const MESSAGE: &str = "TensorProto";
    pub const DIMS: u32 = 1;
    pub const DATA_TYPE: u32 = 2;
    pub const FLOAT_DATA: u32 = 4;
    pub const INT32_DATA: u32 = 5;
    pub const INT64_DATA: u32 = 7;
    pub const NAME: u32 = 8;
    pub const RAW_DATA: u32 = 9;
    pub const DOUBLE_DATA: u32 = 10;
    pub const UINT64_DATA: u32 = 11;
    pub const EXTERNAL_DATA: u32 = 13;
    pub const DATA_LOCATION: u32 = 14;

    pub const LOCATION_EXTERNAL: i64 = 1;
}

/// `SparseTensorProto`.
pub(crate) mod sparse {
    pub const MESSAGE: &str = "SparseTensorProto";
    pub const VALUES: u32 = 1;
    pub const INDICES: u32 = 2;
    pub const DIMS: u32 = 3;
}

/// `ValueInfoProto`.
pub(crate) mod value {
    pub const MESSAGE: &str = "ValueInfoProto";
    pub const NAME: u32 = 1;
    pub const TYPE: u32 = 2;
}

/// `TypeProto`, its `Tensor`, and `TensorShapeProto` with its `Dimension`.
pub(crate) mod types {
    pub const MESSAGE: &str = "TypeProto";
    pub const TENSOR_TYPE: u32 = 1;
    pub const ELEM_TYPE: u32 = 1;
    pub const SHAPE: u32 = 2;
    pub const DIM: u32 = 1;
    pub const DIM_VALUE: u32 = 1;
    pub const DIM_PARAM: u32 = 2;
}

/// `FunctionProto`.
pub(crate) mod function {
    pub const MESSAGE: &str = "FunctionProto";
    pub const NAME: u32 = 1;
    pub const INPUT: u32 = 4;
    pub const OUTPUT: u32 = 5;
    pub const NODE: u32 = 7;
    pub const OPSET_IMPORT: u32 = 9;
    pub const DOMAIN: u32 = 10;
}

/// `TrainingInfoProto`.
pub(crate) mod training {
    pub const MESSAGE: &str = "TrainingInfoProto";
    pub const INITIALIZATION: u32 = 1;
    pub const ALGORITHM: u32 = 2;
}
