//! Lists on their way into one statement.
//!
//! A statement is a trip to the thread of the connection and back, which takes longer than what
//! it does to a row. So a list goes as one parameter, JSON, which `json_each` takes apart; its
//! length changes neither the text of the statement nor its plan.
//!
//! Such a statement names the table's own index (`INDEXED BY`), or joins with CROSS JOIN, which
//! SQLite takes as the order to join in: left to itself it compares each row of the list with
//! each row that is in the right state.

use std::collections::HashSet;
use std::hash::Hash;

use crate::message::MessageId;

/// The ids as `["00ff…", …]`.
pub(super) fn ids(ids: impl IntoIterator<Item = MessageId>) -> String {
    let ids: Vec<String> = ids
        .into_iter()
        .map(|id| format!("\"{}\"", hex(id.as_bytes())))
        .collect();
    format!("[{}]", ids.join(","))
}

/// Rows as a list of lists of columns.
pub(super) fn rows<T: serde::Serialize>(rows: &[T]) -> Result<String, sqlx::Error> {
    serde_json::to_string(rows).map_err(|source| sqlx::Error::Encode(Box::new(source)))
}

/// Bytes as JSON can carry them, for `unhex`.
pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    let digits = bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(*byte)]);
    digits.collect()
}

/// Cuts a list into parts in which nothing is named twice. What is written for one part is
/// there when the next one is read, as if each item had come alone.
pub(super) fn parts<'l, T, N, I>(list: &'l [T], names: impl Fn(&'l T) -> I) -> Vec<&'l [T]>
where
    N: Eq + Hash,
    I: IntoIterator<Item = N>,
{
    let (mut parts, mut began, mut named) = (Vec::new(), 0, HashSet::new());
    for (at, item) in list.iter().enumerate() {
        let own: Vec<N> = names(item).into_iter().collect();
        if own.iter().any(|name| named.contains(name)) {
            parts.push(&list[began..at]);
            began = at;
            named.clear();
        }
        named.extend(own);
    }
    if began < list.len() {
        parts.push(&list[began..]);
    }
    parts
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_list_without_repeats_is_one_part() {
        assert_eq!(parts(&[1, 2, 3], |n| [*n]), [&[1, 2, 3]]);
        assert!(parts(&[], |n: &u8| [*n]).is_empty());
    }

    #[test]
    fn a_repeat_begins_a_part() {
        let cut = parts(&[1, 2, 1, 1, 3], |n| [*n]);
        assert_eq!(cut, [&[1, 2][..], &[1], &[1, 3]]);
    }

    #[test]
    fn any_name_of_an_item_counts() {
        let cut = parts(&[[1, 10], [2, 20], [3, 10]], |names| *names);
        assert_eq!(cut, [&[[1, 10], [2, 20]][..], &[[3, 10]]]);
    }

    #[test]
    fn ids_are_a_list_of_hexadecimal_text() {
        let id = MessageId::from(Uuid::from_u128(0xff));
        assert_eq!(ids([id]), r#"["000000000000000000000000000000ff"]"#);
        assert_eq!(ids([]), "[]");
    }
}
