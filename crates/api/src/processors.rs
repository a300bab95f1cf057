//! An amount of processor time: `1.5` is that of one and a half processors.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// So many are the most: more than any host has.
const MAX: u32 = 4096;

/// Processors, in thousandths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Processors(u32);

impl Processors {
    /// So many thousandths of one.
    #[must_use]
    pub const fn from_thousandths(thousandths: u32) -> Self {
        Self(thousandths)
    }

    /// Thousandths of one.
    #[must_use]
    pub const fn thousandths(self) -> u32 {
        self.0
    }

    fn from_number(number: f64) -> Option<Self> {
        // In range, so that nothing is cut but what is below a thousandth.
        (0.0..=f64::from(MAX)).contains(&number).then(|| Self((number * 1000.0).round() as u32))
    }
}

impl FromStr for Processors {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let number = text.parse().ok().filter(|_| plain).and_then(Self::from_number);
        number.ok_or_else(|| format!("`{text}` is no number of processors, as 0.5 or 2"))
    }
}

impl fmt::Display for Processors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1000.0)
    }
}

impl Serialize for Processors {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / 1000.0)
    }
}

impl<'de> Deserialize<'de> for Processors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = f64::deserialize(deserializer)?;
        let wrong = || serde::de::Error::custom(format!("{number} is no number of processors"));
        Self::from_number(number).ok_or_else(wrong)
    }
}

#[cfg(feature = "v1")]
impl utoipa::PartialSchema for Processors {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        let number = utoipa::openapi::Object::builder()
            .schema_type(utoipa::openapi::schema::Type::Number)
            .description(Some("processors, in thousandths at the finest"))
            .minimum(Some(0.0))
            .maximum(Some(f64::from(MAX)));
        number.build().into()
    }
}

#[cfg(feature = "v1")]
impl utoipa::ToSchema for Processors {}

#[cfg(test)]
mod tests {
    use super::Processors;

    #[test]
    fn parts_of_processors_are_exact_to_the_thousandth() {
        for (text, thousandths) in
            [("2", 2000), ("0.5", 500), (".25", 250), ("0", 0), ("1.0004", 1000)]
        {
            assert_eq!(text.parse(), Ok(Processors(thousandths)), "{text}");
        }
        for bad in ["", "-1", "1e3", "nan", "inf", "5000", "1,5", "."] {
            assert!(bad.parse::<Processors>().is_err(), "{bad}");
        }
        assert_eq!(Processors(1500).to_string(), "1.5");
    }
}
