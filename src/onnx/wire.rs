//! The protobuf wire format: <https://protobuf.dev/programming-guides/encoding/>.
//!
//! Reading is iterative and bounds-checked, and allocates nothing whose size a file declares: a field is a cut of the
//! buffer it was found in.

use super::bytes::Bytes;
use super::error::{Error, Result};

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LEN: u8 = 2;
const GROUP_START: u8 = 3;
const GROUP_END: u8 = 4;
const FIXED32: u8 = 5;

/// The deepest nesting of the (long deprecated) groups that is still skipped over; protobuf's own default.
const MAX_GROUP_DEPTH: usize = 100;

const MAX_FIELD_NUMBER: u64 = (1 << 29) - 1;

/// The value of one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Len(Bytes),
    Group,
}

/// One field of a message, with the bytes it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub message: &'static str,
    pub number: u32,
    pub value: Value,
    /// Tag, length and payload.
    pub raw: Bytes,
}

impl Field {
    /// The one field that `encoded` holds.
    pub fn of(message: &'static str, encoded: Encoder) -> Result<Self> {
        let bytes = Bytes::from(encoded.into_bytes());
        Fields::new(message, &bytes).next().unwrap_or(Err(Error::Truncated { message, offset: 0, missing: 1 }))
    }

    /// Tag and length, without the payload.
    pub fn header(&self) -> Bytes {
        let payload = if let Value::Len(payload) = &self.value { payload.len() } else { 0 };
        let header = self.raw.len().saturating_sub(payload);
        self.raw.cut(0, header).unwrap_or_else(|| self.raw.clone())
    }

    /// An integer, boolean or enum.
    pub fn int(&self) -> Result<i64> {
        match self.value {
            Value::Varint(value) => Ok(value.cast_signed()),
            _ => Err(self.wire_type("an integer")),
        }
    }

    /// A 32-bit float.
    pub fn float(&self) -> Result<f32> {
        match self.value {
            Value::Fixed32(bits) => Ok(f32::from_bits(bits)),
            _ => Err(self.wire_type("a float")),
        }
    }

    /// A nested message or a byte string.
    pub fn bytes(&self) -> Result<&Bytes> {
        match &self.value {
            Value::Len(bytes) => Ok(bytes),
            _ => Err(self.wire_type("a message or string")),
        }
    }

    /// A UTF-8 string.
    pub fn string(&self) -> Result<String> {
        let bytes = self.bytes()?;
        let text = std::str::from_utf8(bytes).map_err(|source| Error::NotUtf8 {
            message: self.message,
            field: self.number,
            offset: bytes.offset().saturating_add(source.valid_up_to()),
        })?;
        Ok(text.to_owned())
    }

    /// Adds the integers of a repeated field, packed or one by one.
    pub fn ints(&self, out: &mut Vec<i64>) -> Result<()> {
        let Value::Len(packed) = &self.value else {
            out.push(self.int()?);
            return Ok(());
        };
        let mut cursor = Cursor { message: self.message, bytes: packed, at: 0 };
        while cursor.at < packed.len() {
            out.push(cursor.varint()?.cast_signed());
        }
        Ok(())
    }

    /// Adds the little-endian bytes of a repeated 32-bit field, packed or one by one.
    pub fn fixed32s(&self, out: &mut Vec<u8>) -> Result<()> {
        match &self.value {
            Value::Fixed32(bits) => out.extend(bits.to_le_bytes()),
            Value::Len(packed) if packed.len().is_multiple_of(4) => out.extend_from_slice(packed),
            _ => return Err(self.wire_type("32-bit values")),
        }
        Ok(())
    }

    /// Adds the little-endian bytes of a repeated 64-bit field, packed or one by one.
    pub fn fixed64s(&self, out: &mut Vec<u8>) -> Result<()> {
        match &self.value {
            Value::Fixed64(bits) => out.extend(bits.to_le_bytes()),
            Value::Len(packed) if packed.len().is_multiple_of(8) => out.extend_from_slice(packed),
            _ => return Err(self.wire_type("64-bit values")),
        }
        Ok(())
    }

    fn wire_type(&self, expected: &'static str) -> Error {
        let offset = self.raw.offset();
        Error::WireType { message: self.message, field: self.number, offset, expected }
    }
}

/// A position in a message.
struct Cursor<'a> {
    message: &'static str,
    bytes: &'a Bytes,
    at: usize,
}

impl Cursor<'_> {
    fn offset(&self) -> usize {
        self.bytes.offset().saturating_add(self.at)
    }

    fn take(&mut self, length: u64) -> Result<Bytes> {
        let available = self.bytes.len().saturating_sub(self.at);
        let end = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length));
        let taken = end.and_then(|end| Some((self.bytes.cut(self.at, end)?, end)));
        let Some((taken, end)) = taken else {
            let missing = length.saturating_sub(available as u64);
            return Err(Error::Truncated { message: self.message, offset: self.offset(), missing });
        };
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        let taken = self.take(N as u64)?;
        for (to, from) in array.iter_mut().zip(taken.iter()) {
            *to = *from;
        }
        Ok(array)
    }

    fn varint(&mut self) -> Result<u64> {
        let start = self.offset();
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let Some(&byte) = self.bytes.get(self.at) else {
                return Err(Error::Truncated { message: self.message, offset: self.offset(), missing: 1 });
            };
            self.at += 1;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Error::NotProtobuf { message: self.message, offset: start, reason: "a varint does not fit 64 bits" })
    }

    /// Field number and wire type.
    fn tag(&mut self) -> Result<(u32, u8)> {
        let offset = self.offset();
        let tag = self.varint()?;
        let number = tag >> 3;
        if number == 0 || number > MAX_FIELD_NUMBER {
            let reason = "a field number is out of range";
            return Err(Error::NotProtobuf { message: self.message, offset, reason });
        }
        Ok((number as u32, (tag & 7) as u8))
    }

    fn value(&mut self, number: u32, wire_type: u8) -> Result<Value> {
        match wire_type {
            VARINT => Ok(Value::Varint(self.varint()?)),
            FIXED64 => Ok(Value::Fixed64(u64::from_le_bytes(self.array()?))),
            FIXED32 => Ok(Value::Fixed32(u32::from_le_bytes(self.array()?))),
            LEN => {
                let length = self.varint()?;
                Ok(Value::Len(self.take(length)?))
            }
            GROUP_START => {
                self.skip_group(number)?;
                Ok(Value::Group)
            }
            _ => Err(Error::NotProtobuf {
                message: self.message,
                offset: self.offset(),
                reason: "a field has a wire type that does not exist",
            }),
        }
    }

    /// Moves past the end of the group `number`, which has just begun.
    fn skip_group(&mut self, number: u32) -> Result<()> {
        let mut open = vec![number];
        while let Some(&innermost) = open.last() {
            let offset = self.offset();
            let (number, wire_type) = self.tag()?;
            match wire_type {
                GROUP_START if open.len() >= MAX_GROUP_DEPTH => {
                    return Err(Error::TooDeep { offset, limit: MAX_GROUP_DEPTH });
                }
                GROUP_START => open.push(number),
                GROUP_END if number == innermost => {
                    open.pop();
                }
                _ => {
                    self.value(number, wire_type)?;
                }
            }
        }
        Ok(())
    }
}

/// The fields of a message, in file order.
pub(crate) struct Fields<'a>(Cursor<'a>);

impl<'a> Fields<'a> {
    pub fn new(message: &'static str, bytes: &'a Bytes) -> Self {
        Self(Cursor { message, bytes, at: 0 })
    }

    fn read(&mut self) -> Result<Field> {
        let cursor = &mut self.0;
        let start = cursor.at;
        let (number, wire_type) = cursor.tag()?;
        let value = cursor.value(number, wire_type)?;
        let length = (cursor.at - start) as u64;
        cursor.at = start;
        let raw = cursor.take(length)?;
        Ok(Field { message: cursor.message, number, value, raw })
    }
}

impl Iterator for Fields<'_> {
    type Item = Result<Field>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.at >= self.0.bytes.len() {
            return None;
        }
        let field = self.read();
        if field.is_err() {
            self.0.at = self.0.bytes.len();
        }
        Some(field)
    }
}

/// Writes fields one after the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Encoder(Vec<u8>);

impl Encoder {
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn tag(&mut self, number: u32, wire_type: u8) {
        self.varint(u64::from(number) << 3 | u64::from(wire_type));
    }

    pub fn int(&mut self, number: u32, value: i64) {
        self.tag(number, VARINT);
        self.varint(value.cast_unsigned());
    }

    pub fn float(&mut self, number: u32, value: f32) {
        self.tag(number, FIXED32);
        self.0.extend(value.to_le_bytes());
    }

    /// Tag and length of a payload that is kept elsewhere.
    pub fn header(&mut self, number: u32, length: u64) {
        self.tag(number, LEN);
        self.varint(length);
    }

    pub fn bytes(&mut self, number: u32, payload: &[u8]) {
        self.header(number, payload.len() as u64);
        self.0.extend_from_slice(payload);
    }

    pub fn string(&mut self, number: u32, text: &str) {
        self.bytes(number, text.as_bytes());
    }

    /// A string that is left out when it is empty, as the format's default.
    pub fn optional_string(&mut self, number: u32, text: &str) {
        if !text.is_empty() {
            self.string(number, text);
        }
    }

    pub fn message(&mut self, number: u32, message: &Self) {
        self.bytes(number, &message.0);
    }

    /// A field as it was.
    pub fn raw(&mut self, field: &Field) {
        self.0.extend_from_slice(&field.raw);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(bytes: Vec<u8>) -> Result<Vec<Field>> {
        Fields::new("Test", &Bytes::from(bytes)).collect()
    }

    /// The examples of the encoding guide: 150 in field 1, "testing" in field 2.
    #[test]
    fn reads_the_examples_of_the_encoding_guide() {
        let fields = read_all(b"\x08\x96\x01\x12\x07testing".to_vec()).unwrap();
        assert_eq!(fields[0].int().unwrap(), 150);
        assert_eq!((fields[1].number, fields[1].string().unwrap()), (2, "testing".into()));
        assert_eq!(&*fields[1].header(), b"\x12\x07");
    }

    #[test]
    fn refuses_what_is_not_a_message() {
        let cases: &[&[u8]] = &[
            b"\x08",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x00\x00",
            b"\x0f",
            b"\x0c",
            b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x0b\x10\x01",
            b"\x0b\x14",
        ];
        for case in cases {
            assert!(read_all(case.to_vec()).is_err(), "{case:x?}");
        }
        let deep = read_all(vec![0x0b; 1 << 20]).unwrap_err();
        assert!(matches!(deep, Error::TooDeep { .. }), "{deep}");
        let wrong = read_all(b"\x08\x01".to_vec()).unwrap();
        assert!(matches!(wrong[0].bytes(), Err(Error::WireType { field: 1, offset: 0, .. })));
    }

    #[test]
    fn groups_are_kept_whole() {
        let bytes = b"\x0b\x13\x10\x01\x14\x0c\x18\x05".to_vec();
        let fields = read_all(bytes.clone()).unwrap();
        assert_eq!((fields.len(), &fields[0].value, fields[1].int().unwrap()), (2, &Value::Group, 5));
        assert_eq!(&*fields[0].raw, &bytes[..6]);
    }

    fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<u64>().prop_map(Value::Varint),
            any::<u32>().prop_map(Value::Fixed32),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(|bytes| Value::Len(bytes.into())),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(fields in proptest::collection::vec((1u32..1 << 29, any_value()), 0..20)) {
            let mut encoder = Encoder::default();
            for (number, value) in &fields {
                match value {
                    Value::Varint(value) => encoder.int(*number, value.cast_signed()),
                    Value::Fixed32(bits) => encoder.float(*number, f32::from_bits(*bits)),
                    Value::Len(bytes) => encoder.bytes(*number, bytes),
                    Value::Fixed64(_) | Value::Group => {}
                }
            }
            let bytes = encoder.into_bytes();
            let read = read_all(bytes.clone()).unwrap();
            let found: Vec<_> = read.iter().map(|field| (field.number, field.value.clone())).collect();
            prop_assert_eq!(found, fields);
            let raw: Vec<u8> = read.iter().flat_map(|field| field.raw.to_vec()).collect();
            prop_assert_eq!(raw, bytes);
        }

        #[test]
        fn packed_and_single_integers_read_alike(values in proptest::collection::vec(any::<i64>(), 0..50)) {
            let mut single = Encoder::default();
            let mut payload = Encoder::default();
            for value in &values {
                single.int(3, *value);
                payload.varint(value.cast_unsigned());
            }
            let mut packed = Encoder::default();
            packed.message(3, &payload);
            for encoder in [single, packed] {
                let mut found = Vec::new();
                for field in read_all(encoder.into_bytes()).unwrap() {
                    field.ints(&mut found).unwrap();
                }
                prop_assert_eq!(&found, &values);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(fields) = read_all(bytes.clone()) {
                let raw: Vec<u8> = fields.iter().flat_map(|field| field.raw.to_vec()).collect();
                prop_assert_eq!(raw, bytes);
            }
        }
    }
}
