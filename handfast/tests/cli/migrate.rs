//! Schemas are applied once, or printed for a person.

use crate::process::{folder, printed};

#[tokio::test]
async fn migrating_twice_applies_nothing_the_second_time() {
    let folder = folder("");
    let arguments = ["migrate", "--store", "sqlite:other.db", "--json"];
    let first: serde_json::Value =
        serde_json::from_str(&printed(folder.path(), &arguments).await).unwrap();
    assert!(first["applied"].as_u64().unwrap() >= 1, "{first}");
    let second: serde_json::Value =
        serde_json::from_str(&printed(folder.path(), &arguments).await).unwrap();
    assert_eq!(second["applied"], 0);
    assert_eq!(second["version"], first["version"]);
    assert!(folder.path().join("other.db").exists());
}

#[tokio::test]
async fn without_a_store_the_one_of_the_configuration_is_migrated() {
    let folder = folder("[server]\nstore = \"sqlite:mine.db\"\n");
    let said = printed(folder.path(), &["migrate"]).await;
    assert!(said.contains("mine.db is at version"), "{said}");
    let said = printed(folder.path(), &["migrate"]).await;
    assert!(said.contains("mine.db is up to date"), "{said}");
}

#[tokio::test]
async fn printing_touches_nothing_and_needs_no_configuration() {
    let empty = tempfile::tempdir().unwrap();
    for (owner, table) in [
        ("message-service", "handfast_service_version"),
        ("fence", "handfast_fence_version"),
        ("inbox", "handfast_inbox_version"),
    ] {
        let sql = printed(empty.path(), &["migrate", "--print", "--owner", owner]).await;
        assert!(sql.contains(table) && sql.contains("COMMIT;"), "{sql}");
    }
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
}
