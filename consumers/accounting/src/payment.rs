//! The fact that accounting understands: a payment was completed.

use serde::Deserialize;

/// The payload of topic `payment.completed`, as JSON. Fields that are not named here belong to
/// other readers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Payment {
    /// The merchant that asked for the payment.
    pub caller: String,
    /// The merchant's number of the order.
    pub order_id: String,
    /// Who paid.
    pub user: String,
    /// Minor units, more than 0.
    pub amount: i64,
}

/// Why a payload is not a payment. Its text does not repeat the payload.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// It is not JSON of this form.
    #[error("the payload is not a payment: {0}")]
    Form(#[from] serde_json::Error),
    /// Nothing was paid.
    #[error("the amount is {0}, it must be more than 0")]
    Amount(i64),
    /// A name is empty.
    #[error("{0} is empty")]
    Empty(&'static str),
}

impl Payment {
    /// The account that the payment is taken from.
    pub(crate) fn clearing(&self) -> String {
        format!("clearing:{}", self.user)
    }

    /// The account that it goes to.
    pub(crate) fn merchant(&self) -> String {
        format!("merchant:{}", self.caller)
    }

    /// Reads a payload.
    pub fn read(payload: &[u8]) -> Result<Self, Unreadable> {
        let payment: Self = serde_json::from_slice(payload)?;
        let names = [
            ("caller", &payment.caller),
            ("order_id", &payment.order_id),
            ("user", &payment.user),
        ];
        for (name, value) in names {
            if value.is_empty() {
                return Err(Unreadable::Empty(name));
            }
        }
        if payment.amount <= 0 {
            return Err(Unreadable::Amount(payment.amount));
        }
        Ok(payment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payment_is_read_and_fields_of_others_are_left_alone() {
        let payload = br#"{"caller":"shop","order_id":"42","user":"ada","amount":1999,"note":1}"#;
        let payment = Payment::read(payload).unwrap();
        assert_eq!((payment.order_id.as_str(), payment.amount), ("42", 1999));
    }

    #[test]
    fn what_is_not_a_payment_is_named() {
        for (payload, text) in [
            ("", "the payload is not a payment: "),
            ("{}", "the payload is not a payment: missing field"),
            (
                r#"{"caller":"shop","order_id":"42","user":"ada","amount":1.5}"#,
                "the payload is not a payment: ",
            ),
            (
                r#"{"caller":"shop","order_id":"42","user":"ada","amount":0}"#,
                "the amount is 0, it must be more than 0",
            ),
            (
                r#"{"caller":"shop","order_id":"","user":"ada","amount":1}"#,
                "order_id is empty",
            ),
        ] {
            let error = Payment::read(payload.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(text), "{payload}: {error}");
        }
    }
}
