//! Element types of tensors.

use std::fmt;

macro_rules! data_types {
    ($($variant:ident = $code:literal, $name:literal, $bits:expr;)*) => {
        /// A tensor's element type, as `TensorProto.DataType` counts them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum DataType {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
            /// A code that this version does not know; it passes through.
            Other(i32),
        }

        impl DataType {
            /// The type with this ONNX code.
            pub fn from_code(code: i32) -> Self {
                match code {
                    $($code => Self::$variant,)*
                    other => Self::Other(other),
                }
            }

            /// The ONNX code.
            pub fn code(self) -> i32 {
                match self {
                    $(Self::$variant => $code,)*
                    Self::Other(code) => code,
                }
            }

            /// Bits of one element; none for strings, undefined and unknown types.
            pub fn bits(self) -> Option<u32> {
                match self {
                    $(Self::$variant => $bits,)*
                    Self::Other(_) => None,
                }
            }
        }

        impl fmt::Display for DataType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$variant => f.write_str($name),)*
                    Self::Other(code) => write!(f, "type#{code}"),
                }
            }
        }
    };
}

data_types! {
    Undefined = 0, "undefined", None;
    Float = 1, "float", Some(32);
    Uint8 = 2, "uint8", Some(8);
    Int8 = 3, "int8", Some(8);
    Uint16 = 4, "uint16", Some(16);
    Int16 = 5, "int16", Some(16);
    Int32 = 6, "int32", Some(32);
    Int64 = 7, "int64", Some(64);
    String = 8, "string", None;
    Bool = 9, "bool", Some(8);
    Float16 = 10, "float16", Some(16);
    Double = 11, "double", Some(64);
    Uint32 = 12, "uint32", Some(32);
    Uint64 = 13, "uint64", Some(64);
    Complex64 = 14, "complex64", Some(64);
    Complex128 = 15, "complex128", Some(128);
    Bfloat16 = 16, "bfloat16", Some(16);
    Float8E4M3Fn = 17, "float8e4m3fn", Some(8);
    Float8E4M3Fnuz = 18, "float8e4m3fnuz", Some(8);
    Float8E5M2 = 19, "float8e5m2", Some(8);
    Float8E5M2Fnuz = 20, "float8e5m2fnuz", Some(8);
    Uint4 = 21, "uint4", Some(4);
    Int4 = 22, "int4", Some(4);
    Float4E2M1 = 23, "float4e2m1", Some(4);
    Float8E8M0 = 24, "float8e8m0", Some(8);
    Uint2 = 25, "uint2", Some(2);
    Int2 = 26, "int2", Some(2);
}

impl DataType {
    /// Bytes that a tensor of these dimensions takes, sub-byte types packed; none when the type has no fixed size, a
    /// dimension is negative, or the product does not fit.
    pub fn byte_len(self, dims: &[i64]) -> Option<u64> {
        let mut elements = 1u64;
        for &dim in dims {
            elements = elements.checked_mul(u64::try_from(dim).ok()?)?;
        }
        let bits = elements.checked_mul(u64::from(self.bits()?))?;
        Some(bits.div_ceil(8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_pass_through() {
        for code in -1..200 {
            assert_eq!(DataType::from_code(code).code(), code);
        }
        assert_eq!(DataType::from_code(7), DataType::Int64);
        assert_eq!(DataType::from_code(99).to_string(), "type#99");
    }

    #[test]
    fn sizes_are_packed_and_checked() {
        assert_eq!(DataType::Float.byte_len(&[2, 3]), Some(24));
        assert_eq!(DataType::Float.byte_len(&[]), Some(4));
        assert_eq!(DataType::Int4.byte_len(&[3]), Some(2));
        assert_eq!(DataType::Double.byte_len(&[0, 7]), Some(0));
        assert_eq!(DataType::Float.byte_len(&[-1]), None);
        assert_eq!(DataType::Float.byte_len(&[i64::MAX, 8]), None);
        assert_eq!(DataType::String.byte_len(&[1]), None);
    }
}
