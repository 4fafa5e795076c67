//! Servers that a store is not opened on.

use handfast_service::store::postgres::OpenError;

use crate::world::{server, try_open};

#[tokio::test]
async fn a_server_that_forgets_what_it_acknowledged_is_refused() {
    for setting in ["fsync", "full_page_writes"] {
        let server = server(&[(setting, "off")]);
        let refused = try_open(&server).await.err().expect("refused");
        assert!(matches!(refused, OpenError::NotDurable { .. }), "{refused}");
        let text = refused.to_string();
        let named = format!("{setting} is off, on is needed");
        assert!(text.contains(&named) && !text.contains('\n'), "{text}");
    }
}

#[tokio::test]
async fn what_a_session_can_set_itself_is_not_refused() {
    let server = server(&[
        ("synchronous_commit", "off"),
        ("default_transaction_isolation", "serializable"),
    ]);
    try_open(&server).await.unwrap();
}
