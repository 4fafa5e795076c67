//! Several processes on one database.

use super::*;
use crate::store::conformance::replicas::presence;

fn answered(n: u128, subscription: &str, through: Option<Timestamp>) -> Presence {
    Presence {
        answered: vec![(subscription.to_owned(), through)],
        ..presence(n)
    }
}

fn of(heard: &Heard, subscription: &str) -> (Option<Timestamp>, Duration) {
    let mut marks = heard.answered.iter();
    let found = marks.find(|mark| mark.0 == subscription);
    found.map(|(_, through, ago)| (*through, *ago)).unwrap()
}

#[tokio::test]
async fn what_one_has_heard_the_other_learns_and_it_only_goes_forward() {
    let harness = open_with_clock().await;
    let (store, another) = (&harness.store, harness.another().await);
    let now = store.now();
    let earlier = now.before(Duration::from_secs(60));
    store.announce(answered(1, "a", Some(now))).await.unwrap();
    store.announce(answered(1, "b", None)).await.unwrap();
    let heard = another.announce(answered(2, "a", Some(earlier))).await;
    let heard = heard.unwrap();
    assert_eq!(heard.alive, 2);
    assert_eq!(of(&heard, "a").0, Some(now));
    assert_eq!(of(&heard, "b").0, None, "answers that do not say to what");
    harness.pass(Duration::from_secs(100)).await;
    let later = store.announce(answered(1, "b", None)).await.unwrap();
    assert!(of(&later, "a").1 >= Duration::from_secs(100));
    assert!(of(&later, "b").1 < Duration::from_secs(100));
    assert_eq!(later.alive, 1, "the other one says nothing any more");
}

#[tokio::test]
async fn an_answer_to_what_is_yet_to_be_sent_counts_up_to_now() {
    let harness = ready().await;
    let store = &harness.store;
    let future = store.now().after(Duration::from_secs(3_600));
    store
        .announce(answered(1, "a", Some(future)))
        .await
        .unwrap();
    let heard = store.announce(presence(1)).await.unwrap();
    assert!(of(&heard, "a").0.unwrap() < future);
}

#[tokio::test]
async fn who_ends_without_a_word_is_shown_for_an_hour() {
    let harness = open_with_clock().await;
    let store = &harness.store;
    store.announce(presence(1)).await.unwrap();
    harness.pass(Duration::from_secs(3_500)).await;
    store.announce(presence(2)).await.unwrap();
    assert_eq!(store.replicas().await.unwrap().len(), 2);
    harness.pass(Duration::from_secs(200)).await;
    store.announce(presence(2)).await.unwrap();
    let replicas = store.replicas().await.unwrap();
    let ids: Vec<_> = replicas.iter().map(|replica| replica.id).collect();
    assert_eq!(ids, [Uuid::from_u128(2)]);
}

#[tokio::test]
async fn many_that_speak_at_once_do_not_hinder_each_other() {
    let harness = ready().await;
    let mut stores = vec![harness.store.clone()];
    for _ in 0..3 {
        stores.push(harness.another().await);
    }
    let mut speaking = tokio::task::JoinSet::new();
    for (n, store) in (1..).zip(stores) {
        speaking.spawn(async move {
            for round in 0..100 {
                let mut said = presence(n);
                let through = Some(Timestamp::from_micros(round));
                for name in ["a", "b", "c"] {
                    said.answered.push((name.to_owned(), through));
                }
                if n % 2 == 0 {
                    said.answered.reverse();
                }
                store.announce(said).await.unwrap();
            }
        });
    }
    speaking.join_all().await;
    assert_eq!(harness.store.replicas().await.unwrap().len(), 4);
}
