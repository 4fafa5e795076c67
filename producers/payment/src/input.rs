//! Requests, checked: what comes through is what the store may keep.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::store::Order;

/// Names are at most this long.
const MAX_NAME_BYTES: usize = 100;
/// In minor units. Far from what a 64-bit balance can hold.
const MAX_AMOUNT: i64 = 1_000_000_000_000;

/// Checks the identity of a payment.
pub(crate) fn order(caller: String, order_id: String) -> Result<Order, Status> {
    name("caller", &caller)?;
    if caller.contains('/') {
        return Err(bad("caller", "must not contain a slash".to_owned()));
    }
    name("order_id", &order_id)?;
    Ok(Order { caller, order_id })
}

/// Checks who pays, and how much.
pub(crate) fn user_and_amount(user: &str, amount: i64) -> Result<(), Status> {
    name("user", user)?;
    if !(1..=MAX_AMOUNT).contains(&amount) {
        let limits = format!("is {amount}, 1 to {MAX_AMOUNT} minor units are allowed");
        return Err(bad("amount", limits));
    }
    Ok(())
}

fn name(field: &str, value: &str) -> Result<(), Status> {
    if value.is_empty() || value.len() > MAX_NAME_BYTES {
        let limits = format!(
            "has {} bytes, 1 to {MAX_NAME_BYTES} are allowed",
            value.len()
        );
        return Err(bad(field, limits));
    }
    if value.contains('\0') {
        return Err(bad(field, "must not contain NUL".to_owned()));
    }
    Ok(())
}

fn bad(field: &str, description: String) -> Status {
    Status::with_error_details(
        Code::InvalidArgument,
        format!("`{field}` {description}"),
        ErrorDetails::with_bad_request_violation(field, description),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_breaks_a_limit_is_named() {
        let refused = [
            order(String::new(), "1".into()).unwrap_err(),
            order("a/b".into(), "1".into()).unwrap_err(),
            order("shop".into(), "x".repeat(101)).unwrap_err(),
            user_and_amount("a\0b", 1).unwrap_err(),
            user_and_amount("ann", 0).unwrap_err(),
            user_and_amount("ann", -5).unwrap_err(),
            user_and_amount("ann", i64::MAX).unwrap_err(),
        ];
        let fields: Vec<_> = refused
            .iter()
            .map(|status| {
                assert_eq!(status.code(), Code::InvalidArgument);
                let bad = status.get_details_bad_request().unwrap();
                bad.field_violations[0].field.clone()
            })
            .collect();
        let wanted = [
            "caller", "caller", "order_id", "user", "amount", "amount", "amount",
        ];
        assert_eq!(fields, wanted);
        assert!(order("shop".into(), "a/b".into()).is_ok());
    }
}
